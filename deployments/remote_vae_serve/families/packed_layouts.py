"""Packed latents: tokens `[B, N, C*p*p]`, as Flux and its kin have them, and how they become what a decoder takes."""

from __future__ import annotations

import torch

from remote_vae.errors import BadRequest
from remote_vae_serve.families.latent_numbers import LatentNumbers
from remote_vae_serve.families.layouts import Layout, Media, RequestHints, without_time


def packed(
    patches: tuple[int, ...] = (2,),
    *,
    media: Media = "image",
    has_time: bool = False,
    layers: bool = False,
    or_layers: bool = False,
    multiple: int = 1,
) -> Layout:
    """The layout of packed latents, as transformers take them: tokens `[B, N, C * p * p]`, each a p x p patch, row by row.

    N is rows x columns for each latent frame or layer; `height` and `width`, in pixels, tell rows from columns.

    Args:
        patches: the p that this family has; the width of a token says which.
        has_time: the decoder takes videos: an axis for time is put in; of a video, tokens go frame by frame.
        layers: one token for each patch of each layer; the first layer is no part of the picture.
        or_layers: the family has latents of layers too, which this is not.
        multiple: the picture's edges are taken down to a multiple of so many latents.

    Returns:
        A layout that unpacks to `[B, C, h, w]`, or `[B, C, T, h, w]` with `has_time` (T is 1 of an image), in the latents' dtype,
        and raises BadRequest where size, `num_frames` or `layers` are missing or do not make N tokens.
    """
    video = media == "video"
    needed = ("num_frames",) if video else ("layers",) if layers else ()

    def unpack(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> torch.Tensor:
        _check_size(latents, space, hints)
        patch = _patch_of(latents, space, patches)
        rows, columns, runs = _grid(latents, space, hints, max(patch, multiple), patch, needed, or_layers)
        shape = (latents.shape[0], runs, rows, columns)
        if hints.patch_order == "ph_pw_c":
            split = latents.view(*shape, patch, patch, space.channels).permute(0, 6, 1, 2, 4, 3, 5)
        else:
            split = latents.view(*shape, space.channels, patch, patch).permute(0, 4, 1, 2, 5, 3, 6)
        made = split.reshape(latents.shape[0], space.channels, runs, rows * patch, columns * patch)
        if layers:
            return made[:, :, 1:].transpose(1, 2).flatten(0, 1)[:, :, None]
        return made if has_time else made[:, :, 0]

    words = "packed [B, N, {channels}]" if patches == (1,) else "packed [B, N, {patched}]"
    expects = (
        " and ".join([f"{words} with height", *needed[:1], "width"]) if needed else f"{words} with height and width"
    )
    return Layout(
        expects,
        media,
        lambda z, space, hints: z.ndim == 3 and (hints.layers is not None if layers else True),
        unpack,
        without_time if has_time and not video else None,
        takes=(*needed, "patch_order"),
    )


def _check_size(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> None:
    for name, value in (("height", hints.height), ("width", hints.width)):
        if value is None:
            raise BadRequest(
                f"Latents of shape {list(latents.shape)} are not [{space.channels}, h, w], and packed latents of "
                f"{space.class_name} need height and width, both, in pixels",
                parameter=name,
            )


def _patch_of(latents: torch.Tensor, space: LatentNumbers, patches: tuple[int, ...]) -> int:
    width = latents.shape[-1]
    for patch in patches:
        if width == space.channels * patch**2:
            return patch
    known = " or ".join(f"{space.channels * p * p} ({space.channels} channels, {p} x {p} patches)" for p in patches)
    raise BadRequest(f"Packed latents have {width} values a token; {space.class_name} takes {known}", parameter="shape")


def _grid(
    latents: torch.Tensor,
    space: LatentNumbers,
    hints: RequestHints,
    multiple: int,
    patch: int,
    needed: tuple[str, ...],
    or_layers: bool,
) -> tuple[int, int, int]:
    """The grid of packed tokens: rows, columns, and how many of such grids there are, of latent frames or layers. Raises
    BadRequest where it is not the number of tokens."""
    height, width = hints.height or 0, hints.width or 0
    step = space.ratio * multiple
    rows, columns = (edge // step * multiple // patch for edge in (height, width))
    runs = 1
    for name in needed:
        value = getattr(hints, name)
        if value is None:
            raise BadRequest(f"Packed latents of {space.class_name} need {name} too", parameter=name)
        runs = value + 1 if name == "layers" else (value - 1) // (space.temporal_ratio or 1) + 1
    if rows * columns * runs != latents.shape[1]:
        several = latents.shape[1] % max(1, rows * columns) == 0
        of, more, parameter = f", {runs} times" if runs != 1 else "", "", "height"
        if several and runs != 1:
            parameter = needed[0]
        elif several and or_layers:
            more, parameter = ". Where they are layers, send layers", "layers"
        raise BadRequest(
            f"height {hints.height} and width {hints.width} make {rows} x {columns} = {rows * columns} tokens of "
            f"{space.ratio * patch} x {space.ratio * patch} pixels{of}; the latents of this {space.class_name} have "
            f"{latents.shape[1]}{more}",
            parameter=parameter,
        )
    return rows, columns, runs


def _unpack_target(latents: torch.Tensor, space: LatentNumbers, hints: RequestHints) -> torch.Tensor:
    """Unpack tokens `[B, N, C, 1, 2, 2]`, 2 x 2 patches of one frame, to `[B, C, 1, h, w]`: those of the picture come first,
    the others are what it was made from."""
    _check_size(latents, space, hints)
    batch, tokens = latents.shape[:2]
    rows, columns = ((edge or 0) // (2 * space.ratio) for edge in (hints.height, hints.width))
    if not rows * columns or rows * columns > tokens:
        raise BadRequest(
            f"height {hints.height} and width {hints.width} make {rows * columns} tokens; the latents of this "
            f"{space.class_name} have {tokens}",
            parameter="height",
        )
    mine = latents[:, : rows * columns].reshape(batch, rows, columns, space.channels, 2, 2)
    return mine.permute(0, 3, 1, 4, 2, 5).reshape(batch, space.channels, 1, 2 * rows, 2 * columns)


TARGET_TOKENS = Layout(
    "tokens [B, N, {channels}, 1, 2, 2] with height and width",
    "image",
    lambda z, space, hints: z.ndim == 6 and tuple(z.shape[2:]) == (space.channels, 1, 2, 2),
    _unpack_target,
    without_time,
)
