"""A family is a row of data: which autoencoders it has, how their latents are laid out and denormalised, what comes out.

`LatentSpace` holds what one loaded model says of its latents: read from its config, never written down here. Torch is
used on tensors handed in; nothing is imported from diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from remote_vae.errors import BadRequest

Media = Literal["image", "video"]
Tile = Callable[[Any, int, int], None]


@dataclass(frozen=True)
class LatentSpace:
    """What a model's config says of its latents.

    Attributes:
        channels: of the latents.
        ratio: pixels along an edge for each latent.
        scaling_factor, shift_factor, mean, std: None where the config has none.
        force_upcast: the model overflows in float16.
        temporal_ratio: frames for each latent frame after the first, of a video model; else None.
    """

    family: Family
    class_name: str
    channels: int
    ratio: int
    scaling_factor: float | None = None
    shift_factor: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    force_upcast: bool = False
    temporal_ratio: int | None = None

    @classmethod
    def of(cls, class_name: str, config: Mapping[str, Any]) -> LatentSpace:
        """From a diffusers class name and its config; a class without a row gets the generic one."""
        family = next((row for row in FAMILIES if class_name in row.classes), GENERIC)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if not mean or not std:
            mean = std = None
        return cls(
            family=family,
            class_name=class_name,
            channels=int(config["latent_channels"]),
            ratio=family.ratio(config),
            scaling_factor=config.get("scaling_factor"),
            shift_factor=config.get("shift_factor"),
            mean=mean and tuple(mean),
            std=std and tuple(std),
            force_upcast=bool(config.get("force_upcast", False)),
            temporal_ratio=config.get("temporal_compression_ratio"),
        )

    def denormalise(self, latents: torch.Tensor) -> torch.Tensor:
        """The model's own convention, as its pipelines apply it before `vae.decode`; channels on axis 1.

        With statistics `z * std / scaling_factor + mean` (diffusers' SDXL pipeline), else `z / scaling_factor +
        shift_factor` (SD, SD3, Flux). The order of operations is the pipelines': it moves the last bit.
        """
        if self.mean is not None and self.std is not None:
            return latents * self._along_channels(self.std, latents) / (
                self.scaling_factor or 1.0
            ) + self._along_channels(self.mean, latents)
        return scale_and_shift(latents, self.scaling_factor, self.shift_factor)

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse, as image-to-image pipelines apply it after `vae.encode`."""
        if self.mean is not None and self.std is not None:
            centred = latents - self._along_channels(self.mean, latents)
            return centred * (self.scaling_factor or 1.0) / self._along_channels(self.std, latents)
        return shift_and_scale(latents, self.scaling_factor, self.shift_factor)

    @staticmethod
    def _along_channels(values: tuple[float, ...], latents: torch.Tensor) -> torch.Tensor:
        return torch.tensor(values, dtype=latents.dtype, device=latents.device).view(1, -1, *[1] * (latents.ndim - 2))


def scale_and_shift(latents: torch.Tensor, factor: float | None, shift: float | None) -> torch.Tensor:
    """`z / factor + shift`; what is None is left out."""
    scaled = latents if factor is None else latents / factor
    return scaled if shift is None else scaled + shift


def shift_and_scale(latents: torch.Tensor, factor: float | None, shift: float | None) -> torch.Tensor:
    """`(z - shift) * factor`, the inverse; what is None is left out."""
    shifted = latents if shift is None else latents - shift
    return shifted if factor is None else shifted * factor


@dataclass(frozen=True)
class Layout:
    """One form in which a family's latents come.

    Attributes:
        expects: how to say it to a user, with the family's numbers filled in by `str.format`.
        fits: whether these latents have this form.
        unpack: to what the decoder takes, channels on axis 1. Raises BadRequest.
        repack: the decoder's output to `[B, C, H, W]` or `[B, C, T, H, W]`, given the latents' shape.
        media: what comes out.
    """

    expects: str
    fits: Callable[[torch.Tensor, LatentSpace, Size], bool]
    unpack: Callable[[torch.Tensor, LatentSpace, Size], torch.Tensor]
    repack: Callable[[torch.Tensor, tuple[int, ...]], torch.Tensor]
    media: Media


@dataclass(frozen=True)
class Size:
    """`height` and `width` of a request, in pixels."""

    height: int | None = None
    width: int | None = None


def _as_is(pixels: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return pixels


def _fold_frames(latents: torch.Tensor, space: LatentSpace, size: Size) -> torch.Tensor:
    batch, channels, frames, height, width = latents.shape
    return latents.permute(0, 2, 1, 3, 4).reshape(batch * frames, channels, height, width)


def _unfold_frames(pixels: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return pixels.reshape(shape[0], shape[2], *pixels.shape[1:]).transpose(1, 2)


def _unpack_tokens(latents: torch.Tensor, space: LatentSpace, size: Size) -> torch.Tensor:
    """Tokens `[B, (h/p)(w/p), C*p*p]` in the order (c, ph, pw), as `FluxPipeline._unpack_latents` takes them, to [B, C, h, w]."""
    patch, step = space.family.patch, space.ratio * space.family.patch
    tokens, width = latents.shape[1:]
    if size.height is None or size.width is None:
        raise BadRequest(
            f"Latents of shape {list(latents.shape)} are not [{space.channels}, h, w], and packed latents need "
            "height and width, both, in pixels",
            parameter="height" if size.height is None else "width",
        )
    rows, columns = size.height // step, size.width // step
    if rows * columns != tokens:
        raise BadRequest(
            f"height {size.height} and width {size.width} make {rows} x {columns} = {rows * columns} tokens of "
            f"{step} x {step} pixels; the latents have {tokens}",
            parameter="height",
        )
    if width != space.channels * patch * patch:
        raise BadRequest(
            f"Packed latents have {width} values a token; this model takes {space.channels * patch * patch} "
            f"({space.channels} channels, {patch} x {patch} patches)",
            parameter="shape",
        )
    patches = latents.view(latents.shape[0], rows, columns, space.channels, patch, patch)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(latents.shape[0], space.channels, rows * patch, columns * patch)


def _is_one_image(latents: torch.Tensor, space: LatentSpace, size: Size) -> bool:
    """`[C, h, w]` without a size, or with its own: SD.Next sends both, for Flux and HiDream. Packed latents of that size have
    another number of tokens, so that nothing is both."""
    if latents.ndim != 3 or latents.shape[0] != space.channels:
        return False
    edges = ((size.height, latents.shape[1]), (size.width, latents.shape[2]))
    return all(pixels is None or pixels // space.ratio == edge for pixels, edge in edges)


IMAGES = Layout(
    expects="[B, {channels}, h, w]",
    fits=lambda z, space, size: z.ndim == 4 and z.shape[1] == space.channels,
    unpack=lambda z, space, size: z,
    repack=_as_is,
    media="image",
)
ONE_IMAGE = Layout(
    expects="[{channels}, h, w]",
    fits=_is_one_image,
    unpack=lambda z, space, size: z[None],
    repack=_as_is,
    media="image",
)
PACKED = Layout(
    expects="packed [B, N, {packed_channels}] with height and width",
    fits=lambda z, space, size: z.ndim == 3,
    unpack=_unpack_tokens,
    repack=_as_is,
    media="image",
)
VIDEO = Layout(
    expects="[B, {channels}, T, h, w]",
    fits=lambda z, space, size: z.ndim == 5 and z.shape[1] == space.channels,
    unpack=lambda z, space, size: z,
    repack=_as_is,
    media="video",
)
FRAMES = Layout(
    expects="[B, {channels}, T, h, w], decoded frame by frame",
    fits=lambda z, space, size: z.ndim == 5 and z.shape[1] == space.channels,
    unpack=_fold_frames,
    repack=_unfold_frames,
    media="video",
)


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
        name: for people.
        classes: diffusers autoencoder classes.
        layouts: forms of latents, tried in order.
        ratio: the spatial compression, from the config.
        patch: latents along an edge of a packed token.
        tile: turns the tiling of a module on, given the module, the size of a tile in pixels and the ratio; None has none.
        has_distribution: its encoder gives a distribution to sample from, not latents.
        decodes_batches: its decoder makes of a batch what it makes of each sample, in less time.
        fps: frames a second of its videos where the request names none.
        cast_first: its pipelines cast latents to the decoder's dtype before they denormalise, not after.
    """

    name: str
    classes: tuple[str, ...]
    layouts: tuple[Layout, ...]
    ratio: Callable[[Mapping[str, Any]], int]
    patch: int = 2
    tile: Tile | None = None
    has_distribution: bool = True
    decodes_batches: bool = True
    fps: float = 8.0
    cast_first: bool = False

    def layout_of(self, latents: torch.Tensor, space: LatentSpace, size: Size) -> Layout:
        """The layout these latents have. Raises BadRequest naming those that would do."""
        for layout in self.layouts:
            if layout.fits(latents, space, size):
                return layout
        expected = " or ".join(self.expected(space))
        raise BadRequest(
            f"Latents of shape {list(latents.shape)} do not fit {space.class_name} ({self.name}); expected {expected}",
            parameter="shape",
        )

    def expected(self, space: LatentSpace) -> list[str]:
        """The shapes it takes, for people."""
        packed = space.channels * self.patch**2
        return [layout.expects.format(channels=space.channels, packed_channels=packed) for layout in self.layouts]

    @property
    def media(self) -> Media:
        """What its decoder makes of one item of a batch, and its encoder takes."""
        return self.layouts[0].media

    def safe_dtype(self, space: LatentSpace, device: str) -> torch.dtype:
        """What `dtype: auto` means: float32 on a CPU; on a GPU half precision, bfloat16 where float16 overflows."""
        if device == "cpu":
            return torch.float32
        return torch.bfloat16 if space.force_upcast else torch.float16

    def safe_encode_dtype(self, space: LatentSpace, device: str) -> torch.dtype:
        """What `encode_dtype: auto` means: as `safe_dtype`, but never bfloat16: an encode drifts in it where a decode does not
        (MS-SSIM 0.76 against 0.98, FastVideo issue 1472)."""
        safe = self.safe_dtype(space, device)
        return torch.float32 if safe is torch.bfloat16 else safe


def _ratio_of_kl(config: Mapping[str, Any]) -> int:
    return int(2 ** (len(config["block_out_channels"]) - 1))


def _ratio_of_tiny(config: Mapping[str, Any]) -> int:
    return int(config["upsampling_scaling_factor"] ** (len(config["decoder_block_out_channels"]) - 1))


def _ratio_if_known(config: Mapping[str, Any]) -> int:
    return _ratio_of_kl(config) if "block_out_channels" in config else 8


def _ratio_of_video(config: Mapping[str, Any]) -> int:
    return int(config["spatial_compression_ratio"])


OVERLAP = 0.25
"""Of a tile's edge that its neighbour has too: with less, seams show (benchmarks/results/tiling.md)."""


def _tile_image(vae: Any, size: int, ratio: int) -> None:
    vae.use_tiling = True
    vae.tile_sample_min_size, vae.tile_latent_min_size = size, size // ratio
    vae.tile_overlap_factor = OVERLAP


def _tile_video(vae: Any, size: int, ratio: int) -> None:
    stride = int(size * (1 - OVERLAP))
    vae.enable_tiling(
        tile_sample_min_height=size,
        tile_sample_min_width=size,
        tile_sample_stride_height=stride,
        tile_sample_stride_width=stride,
    )


IMAGE_LAYOUTS = (IMAGES, ONE_IMAGE, PACKED, FRAMES)
FAMILIES: tuple[Family, ...] = (
    Family("SD 1.x, SDXL, SD3, Flux.1 and kin", ("AutoencoderKL",), IMAGE_LAYOUTS, _ratio_of_kl, tile=_tile_image),
    Family(
        "tiny decoders (TAESD and kin)",
        ("AutoencoderTiny",),
        IMAGE_LAYOUTS,
        _ratio_of_tiny,
        tile=_tile_image,
        has_distribution=False,
    ),
    # 24 frames a second are what the model was trained on; its pipelines cast, then divide.
    Family(
        "HunyuanVideo",
        ("AutoencoderKLHunyuanVideo",),
        (VIDEO,),
        _ratio_of_video,
        fps=24,
        cast_first=True,
        tile=_tile_video,
        decodes_batches=False,
    ),
)
GENERIC = Family("a class without a row: treated as an image VAE", (), IMAGE_LAYOUTS, _ratio_if_known)
