"""Remote VAE for ComfyUI: decode, encode, and a VAE for every other node, on a remote-vae server of your own."""

from __future__ import annotations

# Relative, unlike the rest of this project: ComfyUI loads a folder of custom nodes by its path, under no name of its own.
from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
