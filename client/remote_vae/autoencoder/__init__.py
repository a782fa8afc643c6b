"""A model on a server in place of a pipeline's VAE: `RemoteVAE.as_autoencoder()`. Needs torch and diffusers."""
