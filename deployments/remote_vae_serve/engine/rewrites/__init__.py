"""Graph rewrites: what the `fast` engine does to a diffusers model's operations while they run, a rewrite a file."""
