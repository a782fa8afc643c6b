"""The engine: weights on a device, decode and encode; tiling."""
