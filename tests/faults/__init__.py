"""Every fault that can be injected, at every place where it can strike: `docs/reliability.md` is the table of them."""
