"""`BlockingClient`: for engines whose scheduler is not asynchronous. It drives a client in a thread of its own."""
