"""Middleware: what runs before Serve buffers a body, and before the HTTP app: CORS, tokens, size limit, JSON errors."""
