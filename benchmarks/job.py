"""`job_of`: the job that every peer does, by hand."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any

Job = Callable[[list[int], bytes], tuple[bytes, str]]
"""The latents' shape and bytes to a body and its Content-Type."""


def job_of(spec: dict[str, Any]) -> Job:
    """The job as one would write it by hand: diffusers' own steps, and Pillow's codecs.

    Args:
        spec: `threads`; `folder` of a model, or `pixels` (height, width) of what a made-up one hands over after `seconds`;
            `output`: raw, jpg or png.
    """
    import numpy as np
    import torch
    from diffusers import AutoencoderTiny
    from diffusers.image_processor import VaeImageProcessor
    from PIL import Image

    torch.set_num_threads(spec["threads"])
    processor = VaeImageProcessor()
    if folder := spec.get("folder"):
        vae = AutoencoderTiny.from_pretrained(folder).eval()
    else:
        from remote_vae_serve.engine.fake import picture

        ready = picture(*spec["pixels"])[0].numpy()

    def decode(shape: list[int], body: bytes) -> Any:
        latents = torch.from_numpy(np.frombuffer(body, np.float32).reshape(shape).copy())
        if folder:
            with torch.inference_mode():
                pixels = vae.decode(latents).sample
            return processor.postprocess(pixels, output_type="pil")[0]
        time.sleep(spec["seconds"])
        return ready if spec["output"] == "raw" else Image.fromarray(ready)

    def job(shape: list[int], body: bytes) -> tuple[bytes, str]:
        picture = decode(shape, body)
        if spec["output"] == "raw":
            return picture.tobytes(), "tensor/binary"
        file = io.BytesIO()
        if spec["output"] == "jpg":
            picture.save(file, "JPEG", quality=90)
        else:
            picture.save(file, "PNG")
        return file.getvalue(), f"image/{spec['output']}"

    return job
