"""`ServerVAE`: what ComfyUI's nodes take for a VAE, with the weights on the server."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from remote_vae import errors

from .model import Geometry, Ratio, RemoteModel

logger = logging.getLogger(__name__)
T = TypeVar("T")

NOT_THE_USERS = (
    errors.BrokenReply, errors.ConnectionFailed, errors.DeadlineExceeded, errors.InternalError, errors.TimedOut,
    errors.Unavailable,
)  # fmt: skip
"""Errors that a local VAE can make good. What is wrong with a request, it would only hide."""


def process_input(image: torch.Tensor) -> torch.Tensor:
    return image * 2.0 - 1.0


def process_output(image: torch.Tensor) -> torch.Tensor:
    return (image / 2.0 + 0.5).clamp(0.0, 1.0)


def _management() -> Any:
    """ComfyUI's model_management, or None where these nodes run without ComfyUI."""
    try:
        from comfy import model_management
    except ImportError:
        return None
    return model_management


class ServerVAE:
    """Has the methods and the attributes of `comfy.sd.VAE` that nodes use.

    Tiles are for small local GPUs: `decode_tiled` and `encode_tiled` send the whole, and leave it to the server.

    Args:
        model: the one on the server.
        fallback: a local VAE, used where the server cannot; never where the request is at fault.
    """

    output_channels = 3
    pad_channel_value = None
    extra_1d_channel = None
    format_encoded = None
    disable_offload = True
    handles_tiling = True
    crop_input = True
    audio_sample_rate = 44100
    size = 0
    working_dtypes = (torch.float32,)
    vae_dtype = torch.float32
    device = torch.device("cpu")
    process_input = staticmethod(process_input)
    process_output = staticmethod(process_output)

    def __init__(self, model: RemoteModel, fallback: Any = None) -> None:
        self.first_stage_model = model
        self.fallback = fallback
        self.not_video = False

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"A remote VAE has no {name!r}: its weights are on the server. This node reaches into the model; "
            "give it a local VAE"
        )

    @property
    def latent_channels(self) -> int:
        return self._geometry().latent_channels

    @property
    def latent_dim(self) -> int:
        return self._geometry().latent_dim

    @property
    def upscale_ratio(self) -> Ratio:
        return self._geometry().upscale_ratio

    @property
    def downscale_ratio(self) -> Ratio:
        return self._geometry().downscale_ratio

    @property
    def upscale_index_formula(self) -> tuple[int, int, int] | None:
        return self._geometry().index_formula

    @property
    def downscale_index_formula(self) -> tuple[int, int, int] | None:
        return self._geometry().index_formula

    @property
    def output_device(self) -> torch.device:
        management = _management()
        device: torch.device = management.intermediate_device() if management else torch.device("cpu")
        return device

    def vae_output_dtype(self) -> torch.dtype:
        """float32, unless ComfyUI was told to keep images in half precision."""
        dtype: torch.dtype = getattr(_management(), "intermediate_dtype", lambda: torch.float32)()
        return dtype

    def _geometry(self) -> Geometry:
        return self._try(self.first_stage_model.geometry, Geometry.like)

    def _try(self, remote: Callable[[], T], local: Callable[[Any], Any]) -> T:
        """The server's answer, or the fallback's."""
        try:
            return remote()
        except NOT_THE_USERS as error:
            if self.fallback is None:
                raise
            logger.warning("%s. The local VAE is used instead.", error.message.rstrip("."))
        answer: T = local(self.fallback)
        return answer

    def decode(self, samples_in: torch.Tensor, vae_options: Mapping[str, Any] | None = None) -> torch.Tensor:
        """Latents `[B, C, h, w]` to images `[B, H, W, 3]`; `[B, C, T, h, w]` to `[B, T, H, W, 3]`; in [0, 1].

        Several frames given to an image model are all decoded; of one frame `[B, C, 1, h, w]` come images `[B, H, W, 3]`.
        """
        options = {"vae_options": vae_options} if vae_options else {}
        return self._try(lambda: self._decode(samples_in), lambda vae: vae.decode(samples_in, **options))

    def decode_tiled(self, samples: torch.Tensor, *tiles: Any, **named_tiles: Any) -> torch.Tensor:
        return self._try(lambda: self._decode(samples), lambda vae: vae.decode_tiled(samples, *tiles, **named_tiles))

    def encode(self, pixel_samples: torch.Tensor, not_video: bool | None = None) -> torch.Tensor:
        """Images `[B, H, W, 3 or more]` in [0, 1] to latents `[B, C, h, w]`; for a video model they are frames of one video,
        `[1, C, T, h, w]`, unless `not_video`. Sizes are cropped to what the model can encode, the middle kept."""
        options = {} if not_video is None else {"not_video": not_video}
        return self._try(
            lambda: self._encode(pixel_samples, not_video), lambda vae: vae.encode(pixel_samples, **options)
        )

    def encode_tiled(
        self, pixel_samples: torch.Tensor, *tiles: Any, not_video: bool | None = None, **named_tiles: Any
    ) -> torch.Tensor:
        options = named_tiles if not_video is None else {**named_tiles, "not_video": not_video}
        return self._try(
            lambda: self._encode(pixel_samples, not_video),
            lambda vae: vae.encode_tiled(pixel_samples, *tiles, **options),
        )

    def _decode(self, samples: torch.Tensor) -> torch.Tensor:
        dim = self.first_stage_model.geometry().latent_dim
        if dim == 2 and samples.ndim == 5 and samples.shape[2] == 1:
            samples = samples[:, :, 0]
        elif dim == 2 and samples.ndim == 5:
            logger.warning(
                "Latents of %d frames go to a model for images, which decodes each by itself; are they of a video model?",
                samples.shape[2],
            )
        pixels = self.first_stage_model.decode(samples)
        # Widened first: the server may answer in half precision.
        images = process_output(pixels.float()).to(self.output_device, self.vae_output_dtype())
        return images.movedim(1, -1)

    def _encode(self, pixels: torch.Tensor, not_video: bool | None) -> torch.Tensor:
        dim = self.first_stage_model.geometry().latent_dim
        pixels = self.vae_encode_crop_pixels(pixels).movedim(-1, 1)
        if dim == 3 and pixels.ndim < 5:
            alone = self.not_video if not_video is None else not_video
            pixels = pixels.unsqueeze(2) if alone else pixels.movedim(1, 0).unsqueeze(0)
        latents = self.first_stage_model.encode(process_input(pixels.float()))
        return latents.to(self.output_device, self.vae_output_dtype())

    def vae_encode_crop_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Height and width cut to multiples of the ratio, at both ends alike; alpha left out."""
        ratio = self.spacial_compression_encode()
        for axis in (-3, -2):
            size = pixels.shape[axis]
            kept = size // ratio * ratio
            if not kept:
                height, width = pixels.shape[-3:-1]
                raise errors.BadRequest(
                    f"The image is {width} x {height} pixels; this model needs {ratio} x {ratio} at least",
                    parameter="pixels",
                )
            pixels = pixels.narrow(axis, size % ratio // 2, kept)
        return pixels[..., : self.output_channels]

    def spacial_compression_decode(self) -> int:
        return _spatial(self.upscale_ratio)

    def spacial_compression_encode(self) -> int:
        return _spatial(self.downscale_ratio)

    def temporal_compression_decode(self) -> int | None:
        ratio = self.upscale_ratio
        return round(ratio[0](8192) / 8192) if isinstance(ratio, tuple) else None

    def memory_used_decode(self, shape: Any, dtype: torch.dtype) -> int:
        """Bytes of this machine's GPU: none to speak of. (Nodes divide by it.)"""
        return 1

    memory_used_encode = memory_used_decode

    def model_size(self) -> int:
        return self.size

    def throw_exception_if_invalid(self) -> None:
        """It is valid, or the Load node would have said so."""

    def is_dynamic(self) -> bool:
        return False

    def get_sd(self) -> dict[str, torch.Tensor]:
        raise RuntimeError("The weights of a remote VAE are on the server; there is nothing here to save")


def _spatial(ratio: Ratio) -> int:
    return ratio[-1] if isinstance(ratio, tuple) else ratio
