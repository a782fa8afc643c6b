"""The VAE deployment: one replica of one model, its pipeline of host and device work, and dynamic batching."""
