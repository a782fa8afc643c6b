"""The families of autoencoders: latent layouts, scaling, pixel ranges and calls of diffusers' modules, as data."""
