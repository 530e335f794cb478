"""How a client and a server talk: `docs/protocol.md` has every message, with test vectors.

frames      bytes <-> payloads, length-prefixed; knows no socket
messages    requests, answers, and payloads <-> messages: msgspec structs in MessagePack; knows no socket
prompts     prompts and layouts as they travel
parts       what is told of several prompts, as it travels
certificates the files of TLS
address     where a server listens: unix:///path, tcp://host:port or tls://host:port
secured     TLS below a connection
greeting    the first frame in each direction, with the file descriptors that travel beside it
descriptors ones that are no standard streams
partials    frames that have begun: bounded in bytes and in time, over all connections
connection  one end of an open connection: messages in and out, back-pressure
"""
