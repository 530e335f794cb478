"""A client of Mooncake's own, in a process of its own: it gives memory to the pool, and does what it is told by lines.

    python bare.py MASTER SEGMENT_BYTES

Each line is a list in JSON, a method and its arguments; bytes are in hex. It is answered by a line of JSON.
"""

import json
import sys

from mooncake.store import MooncakeDistributedStore


def answer(result: object) -> None:
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


def main() -> None:
    client = MooncakeDistributedStore()
    code = client.setup("127.0.0.1", "P2PHANDSHAKE", int(sys.argv[2]), 16 << 20, "tcp", "", sys.argv[1])
    answer(code)
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        if verb == "put":
            name, value = arguments
            client.remove(name, True)
            result = client.put(name, bytes.fromhex(value))
        elif verb == "get":
            result = client.get(arguments[0]).hex()
        else:
            result = getattr(client, verb)(*arguments)
        answer(result)
    client.close()


main()
