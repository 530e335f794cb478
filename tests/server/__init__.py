"""The service, with real processes: servers and clients are programs of their own, and are killed."""
