"""Preprocess and postprocess: what is done to latents and pixels around the model."""
