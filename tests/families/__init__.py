"""What each autoencoder family's own pipeline makes of its latents: one case a convention, held against the server."""
