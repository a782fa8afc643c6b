"""The end of diffusers' own pipelines, run from their source: what they hand to `vae.decode`, and what comes out.

A pipeline cannot be called without text encoders and a transformer. Its last block, `if output_type == "latent": ... else:
...`, needs none of them: it is cut out of `__call__` and run as it stands, so no formula is written down here.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from diffusers import (
    FluxPipeline,
    HunyuanVideoPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

PIPELINES: dict[str, Any] = {
    "sd": StableDiffusionPipeline,
    "sdxl": StableDiffusionXLPipeline,
    "sd3": StableDiffusion3Pipeline,
    "flux": FluxPipeline,
    "tiny": StableDiffusionPipeline,
    "hunyuan": HunyuanVideoPipeline,
}


class _Reached(Exception):
    """The block came to `vae.decode`; `args[0]` is what it was given."""


def decoder_input(kind: str, vae: Any, z: torch.Tensor, height: int | None = None, width: int | None = None) -> Any:
    """What the pipeline of that kind gives to `vae.decode` for the latents `z`, packed or `[B, C, h, w]`."""
    pipeline = PIPELINES["sd3" if kind == "flux" and z.ndim == 4 else kind]  # FluxPipeline knows packed latents only

    def decode(latents: torch.Tensor, **_: Any) -> NoReturn:
        raise _Reached(latents)

    me = SimpleNamespace(vae=_with_decode(vae, decode), vae_scale_factor=8)
    if hasattr(pipeline, "_unpack_latents"):
        me._unpack_latents = pipeline._unpack_latents
    names = {"self": me, "output_type": "pil", "latents": z, "height": height, "width": width, "generator": None}
    try:
        exec(_last_block(pipeline), vars(sys.modules[pipeline.__module__]) | names)
    except _Reached as reached:
        return reached.args[0]
    raise AssertionError(f"{pipeline.__name__} did not come to vae.decode")


def local_pixels(kind: str, vae: Any, z: torch.Tensor, **sizes: int) -> torch.Tensor:
    """The decoder's output in a pipeline of that kind; 5-D latents frame by frame, as AnimateDiffPipeline does."""
    if z.ndim == 5 and kind != "hunyuan":
        frames = torch.stack([local_pixels(kind, vae, frame) for frame in z.unbind(2)], 2)
        return frames
    with torch.inference_mode():
        return vae.decode(decoder_input(kind, vae, z, **sizes), return_dict=False)[0]


def formula(function: Any, *mentioned: str) -> Any:
    """The one expression assigned in a diffusers function that mentions all these names, compiled."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    found = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and set(mentioned) <= _names(node.value)
        and "scaling_factor" in _names(node.value)
    ]
    assert len(found) == 1, [ast.unparse(node) for node in found]
    return compile(ast.Expression(found[0]), function.__qualname__, "eval")


def _names(node: ast.AST) -> set[str]:
    nodes = list(ast.walk(node))
    return {n.id for n in nodes if isinstance(n, ast.Name)} | {n.attr for n in nodes if isinstance(n, ast.Attribute)}


def _last_block(pipeline: Any) -> Any:
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(pipeline.__call__))))
    blocks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "'latent'" in ast.unparse(node.test) and "vae.decode" in ast.unparse(node)
    ]
    assert len(blocks) == 1, pipeline
    return compile(ast.Module([blocks[0]], []), pipeline.__name__, "exec")


def _with_decode(vae: Any, decode: Any) -> Any:
    """The model with another `decode`; its config, dtype and modules as they are."""
    stand_in = object.__new__(type(vae))
    stand_in.__dict__ = dict(vae.__dict__)
    stand_in.__dict__["decode"] = decode
    return stand_in
