"""What decoders cost on this machine's GPU: `python -m benchmarks.gpu`. Knows torch and diffusers, neither Ray nor the server.

The server's own package is left out on purpose: it refuses to be imported where Ray is missing, and a machine that is only
lent for its GPU often has none.
"""
