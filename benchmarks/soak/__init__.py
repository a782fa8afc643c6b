"""Soak test: traffic of every kind against a real server, while its parts are killed; every reply is compared."""
