"""The protocol: requests and results as frozen values, and how they are written over HTTP and over a Ray handle. No I/O."""
