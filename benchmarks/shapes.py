"""Made-up traces that no policy was tuned to: `python benchmarks/shapes.py DIRECTORY [SEED]`, in our own format.

agents  eight templates of 4,000 tokens; a run goes on from its last prompt by a tool's answer (log-normal, median 600
        tokens) after seconds, 12 times in the mean, and never again; four in five calls take 2 s, one in five 60 s
batch   rounds of 200 questions at once over one of 40 documents (8,000 tokens), which come back by Zipf's law
chats   60 people, each with one conversation that grows by 400 tokens a turn, and pauses of minutes
"""

import random
import sys
from hashlib import blake2b
from pathlib import Path

from async_cache.recording.trace import Trace, TracedRequest, lines

CHUNK_TOKENS = 256


class Session:
    """A prompt that grows: its chunks, each of which stands for all before it."""

    def __init__(self, name, tokens, begin=None):
        self.name, self.tokens = name, begin.tokens if begin else 0
        self.path = list(begin.path) if begin else []
        self.grow(tokens)

    def grow(self, tokens):
        self.tokens += tokens
        while len(self.path) < self.tokens // CHUNK_TOKENS:
            parent = self.path[-1] if self.path else b""
            named = f"{self.name}/{len(self.path)}".encode()
            self.path.append(blake2b(parent + named, digest_size=32).digest())

    def asked(self, at_seconds, output_tokens):
        return TracedRequest(at_seconds, self.tokens, output_tokens, list(self.path), CHUNK_TOKENS)


def agents(dice):
    templates = [Session(f"template {number}", 4000) for number in range(8)]
    for number in range(150):
        at, session = dice.uniform(0, 1800), Session(f"agent {number}", 300, dice.choice(templates))
        while True:
            output = int(dice.expovariate(1 / 150))
            yield session.asked(at, output)
            if dice.random() < 1 / 12:
                break
            at += output / 50 + dice.expovariate(1 / (60 if dice.random() < 0.2 else 2))
            session.grow(output + int(dice.lognormvariate(6.4, 1)))


def batch(dice):
    documents = [Session(f"document {number}", 8000) for number in range(40)]
    weights = [1 / (rank + 1) for rank in range(40)]
    for turn in range(10):
        (document,) = dice.choices(documents, weights)
        for number in range(200):
            question = Session(f"question {turn} {number}", dice.randrange(50, 600), document)
            yield question.asked(turn * 300 + dice.uniform(0, 60), dice.randrange(20, 200))


def chats(dice):
    for number in range(60):
        at, session = dice.uniform(0, 600), Session(f"chat {number}", dice.randrange(500, 6000))
        while at < 3600:
            output = dice.randrange(50, 800)
            yield session.asked(at, output)
            session.grow(output + dice.randrange(20, 400))
            at += output / 50 + dice.lognormvariate(4.5, 1)


def main(directory, seed="0"):
    for shape in (agents, batch, chats):
        requests = sorted(shape(random.Random(int(seed))), key=lambda request: request.at_seconds)
        path = Path(directory, f"{shape.__name__}.jsonl")
        path.write_text("".join(f"{line}\n" for line in lines(Trace(requests))))
        distinct = len({chunk for request in requests for chunk in request.path}) * CHUNK_TOKENS
        print(f"{path}: {len(requests):,} requests, {distinct:,} tokens that differ")


if __name__ == "__main__":
    main(*sys.argv[1:])
