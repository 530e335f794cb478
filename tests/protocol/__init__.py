"""The protocol: the wire, the document that describes it, and what a peer may send that means harm."""
