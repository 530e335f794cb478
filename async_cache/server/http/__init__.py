"""The same server to browsers and monitors, over HTTP.

serving   uvicorn in the server's own loop
site      what is answered, and to whom
health    what is wrong, if something is
explain   why a prompt is not cached
keeping   to keep prompts, and to load them beforehand
named     values as JSON has them
status    what the page and `async-cache top` show, as one value
page.html the page: one file, as it is
"""
