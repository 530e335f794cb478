"""What was checked and measured: the last that is printed."""


class Report:
    """The tables. The first check that fails ends the run."""

    def __init__(self):
        self.checks, self.figures = {}, {}

    def check(self, holds, what, detail=""):
        print(f"{'ok    ' if holds else 'FAILED'} {what} {detail}", flush=True)
        self.checks.setdefault(what, []).append(bool(holds))
        if not holds:
            raise SystemExit(1)

    def figure(self, what, name, value, aim=""):
        row = self.figures.setdefault(what, {"aim": aim})
        row[name] = value
        print(f"{name}: {what}: {value}", flush=True)

    def print(self):
        if self.figures:
            print("\n| first token after (medians) | ours | LMCache 0.5.6 | aim |\n|---|---|---|---|")
        for what, row in self.figures.items():
            print(f"| {what} | {row.get('ours', '')} | {row.get('LMCache', '')} | {row['aim']} |")
        print("\n| checked | times | |\n|---|---|---|")
        for what, outcomes in self.checks.items():
            print(f"| {what} | {len(outcomes)} | {'holds' if all(outcomes) else 'FAILS'} |")


def in_ms(seconds):
    return f"{seconds * 1000:.0f} ms"
