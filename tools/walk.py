"""The walk of one request through a replica, module by module: `python tools/walk.py`.

Decodes and encodes once on the bundled demo VAE, from `Pipeline` to the result, and writes down the calls into modules of this
project, on whichever thread. A stay is a run of calls into one module; a turn is a stay in a module that was left before. Few
turns mean that the code can be read in the order in which it runs.

Two walks are told. That of the payload counts the calls that are handed what travels: the request, its tensor, pixels, the
result. That of every call counts each property and each question about a shape, too. A lambda or a comprehension is a part of
the function that it stands in.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.encode_request import EncodeRequest
from remote_vae.protocol.tensors import from_array
from remote_vae.protocol.wire import Scaling
from remote_vae_serve.config import VAEConfig
from remote_vae_serve.engine.diffusers_engine import DiffusersEngine
from remote_vae_serve.replica.pipeline import Pipeline

ROOT = Path(__file__).parents[1]
PACKAGES = (ROOT / "deployments" / "remote_vae_serve", ROOT / "client" / "remote_vae")
ESTIMATE = "remote_vae_serve/engine/memory/estimate.py"
REWRITING = "remote_vae_serve/engine/rewrites/rewriting.py"
LEFT_OUT = (ESTIMATE, REWRITING)
"""What these do inside is left out: an estimate of memory runs the same model a second time, on torch's meta device; a rewrite is
called at each of a model's operations, hundreds of them."""


class Walk:
    """The modules that calls went into, in order; calls into one module that follow each other are one stay.

    Args:
        counts: whether a call with these arguments is of this walk.
    """

    def __init__(self, counts: Callable[[Iterable[Any]], bool]) -> None:
        self.stays: list[str] = []
        self._counts = counts
        self._lock = threading.Lock()

    @property
    def turns(self) -> list[str]:
        """The modules that were entered again, once for each time."""
        return [stay for number, stay in enumerate(self.stays) if stay in self.stays[:number]]

    def enter(self, module: str, arguments: Iterable[Any]) -> None:
        with self._lock:
            if (not self.stays or self.stays[-1] != module) and self._counts(arguments):
                self.stays.append(module)

    def __str__(self) -> str:
        marked = [("<- " if stay in self.stays[:number] else "   ") + stay for number, stay in enumerate(self.stays)]
        count = f"{len(self.stays)} stays in {len(set(self.stays))} modules, {len(self.turns)} turns"
        return "\n".join([*marked, count])


def walks(run: Callable[[], Coroutine[Any, Any, Any]]) -> tuple[Walk, Walk]:
    """The walk of the payload, and that of every call."""
    both = Walk(lambda arguments: any(map(is_payload, arguments))), Walk(lambda _: True)
    begun: set[FrameType] = set()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or code.co_name.startswith("<") or (module := _module(code.co_filename)) is None:
            return
        if frame in begun or _is_inside(frame.f_back):  # a coroutine that goes on is no call
            return
        if code.co_flags & inspect.CO_COROUTINE:
            begun.add(frame)
        arguments = [frame.f_locals[name] for name in code.co_varnames[: code.co_argcount] if name in frame.f_locals]
        for walk in both:
            walk.enter(module, arguments)

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        asyncio.run(run())
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return both


def is_payload(value: Any) -> bool:
    """Whether the value is a tensor with something in it, or an object of ours that holds one."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return bool(np.prod(value.shape) > 0)
    ours = type(value).__module__.startswith("remote_vae")
    return ours and any(map(is_payload, getattr(value, "__dict__", {}).values()))


def _module(file: str) -> str | None:
    path = Path(file)
    return next((str(path.relative_to(package.parent)) for package in PACKAGES if path.is_relative_to(package)), None)


def _is_inside(frame: FrameType | None) -> bool:
    """Whether a call came out of what is left out."""
    while frame is not None:
        if frame.f_code.co_filename.endswith(LEFT_OUT):
            return True
        frame = frame.f_back
    return False


def of_demo(request: DecodeRequest | EncodeRequest) -> tuple[Walk, Walk]:
    """The first request to the bundled demo VAE: later ones of its shape ask less."""
    engine = DiffusersEngine(VAEConfig(source="demo", device="cpu", num_gpus=0, threads=1), "cpu")
    engine.load()

    async def run() -> None:
        pipeline = Pipeline(engine, "demo")
        await pipeline.answer(request)
        pipeline.close()

    return walks(run)


def main() -> None:
    latents, pixels = (np.zeros(shape, np.float32) for shape in ((1, 16, 8, 8), (1, 3, 64, 64)))
    requests: dict[str, DecodeRequest | EncodeRequest] = {
        "decode": DecodeRequest(from_array(latents), Scaling(own=True)),
        "encode": EncodeRequest(from_array(pixels), Scaling(own=True)),
    }
    for name, request in requests.items():
        for of, walk in zip(("the payload", "every call"), of_demo(request), strict=True):
            print(f"{name}, the walk of {of}:\n{walk}\n")


if __name__ == "__main__":
    main()
