"""From the URL of a backend to the backend.

url       a URL, split into its parts
schemes   our own schemes, and what makes their backends
registry  what a URL asks for, of ours or of another package
"""
