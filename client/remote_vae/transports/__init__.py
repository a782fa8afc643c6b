"""Transports: requests to a server over HTTP or through a Ray handle, with retries; a local fallback."""
