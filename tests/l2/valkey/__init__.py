"""The backend of Valkey and Redis, against real servers: `servers` starts them."""
