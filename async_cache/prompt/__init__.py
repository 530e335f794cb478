"""What is asked for, and what fixes it. Pure.

keys       token ids -> chained chunk hashes -> object keys
objects    groups of layers, and the objects of a chunk as bits of an int
layout     how a model's KV is cut into chunks; prompts, hashed under a layout
parts      several prompts that one request asks for, and the runs of chunks that these are
origin     whose chunks are, and of which model, revision and adapter
coverage   found objects -> the prefix that they serve
arguments  checks of what callers give
"""
