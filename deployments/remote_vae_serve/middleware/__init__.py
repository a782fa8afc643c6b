"""Middleware: what runs before Serve buffers a body, and before the HTTP app: tokens, size limit, JSON for Serve's own errors."""
