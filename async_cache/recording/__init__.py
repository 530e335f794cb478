"""The requests of a server as a trace: who asked for the same, when, and how much; nothing of whom or what.

trace      the requests of a recording, as they are in a file
rotation   a file that stays within its bound, with those that were full before it
recorder   what is noted in the loop, and a thread that writes it
recording  the recorder that the settings want
"""
