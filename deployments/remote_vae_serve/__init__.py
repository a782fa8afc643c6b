"""The server: Ray Serve applications for VAE models, and the ingress in front of them."""

from importlib.util import find_spec

_NEEDED = ("ray", "torch", "diffusers", "safetensors", "starlette", "pydantic", "imageio_ffmpeg")
_missing = [name for name in _NEEDED if find_spec(name) is None]
if _missing:
    raise ImportError(f"remote_vae_serve needs {', '.join(_missing)}: pip install 'remote-vae[serve]'")
