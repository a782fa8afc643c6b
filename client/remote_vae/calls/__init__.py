"""Calls: the arguments of `decode` and `encode` to requests, and results to pictures, videos and tensors. No I/O."""
