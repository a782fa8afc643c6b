"""HTTP: the Starlette app that the ingress and a replica's own path hang up, its OpenAPI description and its responses."""
