"""How a client and a server talk: `docs/protocol.md` has every message, with test vectors.

frames      bytes <-> payloads, length-prefixed; knows no socket
messages    payloads <-> messages: msgspec structs in MessagePack; knows no socket
prompts     prompts and layouts as they travel
address     where a server listens: unix:///path or tcp://host:port
greeting    the first frame in each direction, with the file descriptors that travel beside it
descriptors ones that are no standard streams
partials    frames that have begun: bounded in bytes and in time, over all connections
connection  one end of an open connection: messages in and out, back-pressure
"""
