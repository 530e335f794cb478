"""What is asked for, and what fixes it. Pure.

keys       token ids -> chained chunk hashes -> object keys
objects    groups of layers, and the objects of a chunk as bits of an int
layout     how a model's KV is cut into chunks; prompts, hashed under a layout
coverage   found objects -> the prefix that they serve
arguments  checks of what callers give
"""
