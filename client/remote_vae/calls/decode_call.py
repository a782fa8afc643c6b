"""Arguments and result of a `decode` on the client: `DecodeCall` turns the arguments of `decode` into requests, and their
results into a picture, pictures, a video or a tensor. Pure; `client` puts a transport in between."""

from __future__ import annotations

import io
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from remote_vae.errors import BadRequest, BrokenReply
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.hints import Hints
from remote_vae.protocol.messages import Transfer
from remote_vae.protocol.output import Output
from remote_vae.protocol.result import Result
from remote_vae.protocol.tensors import RawTensor, cast, from_array, host_bytes, is_torch, to_numpy, to_torch
from remote_vae.protocol.wire import Scaling

if TYPE_CHECKING:
    import torch

OutputType = Literal["pil", "pt", "mp4"]
ImageFormat = Literal["jpg", "png"]
Decoded = Any
"""PIL image, list of images, list of such lists, bytes of an mp4, torch tensor or numpy array: see `DecodeCall`."""


@dataclass(frozen=True, eq=False)
class DecodeCall:
    """The arguments of one `decode`, with the names of the Hugging Face helper.

    Attributes:
        tensor: latents, torch or numpy, float16, bfloat16 or float32: `[B, C, h, w]`, `[C, h, w]`, packed `[B, N, C]`
            with `height` and `width`, or video `[B, C, T, h, w]`.
        processor: a diffusers `VaeImageProcessor` or `VideoProcessor`. With `output_type="pil"` a flag: the reply is a
            float tensor, made into images here. With `output_type="pt"` its `postprocess` makes the images.
        do_scaling: False means the latents are ready for the decoder. True means scale here: by the factors if they are
            given, else by the model's own convention, so that nobody has to know 0.18215.
        scaling_factor, shift_factor: `z / scaling_factor + shift_factor`.
        output_type: what the server sends: `pil` an image, `pt` a tensor, `mp4` a video.
        return_type: what comes out: `pil`, `pt` or `mp4`. None is what fits: the video of an mp4, the tensor of a `pt`,
            images wherever images can be made without guessing (`pil`, a processor, `partial_postprocess`).
        image_format: `jpg`, smaller, or `png`, exact.
        partial_postprocess: with `output_type="pt"`, uint8 pixels instead of the decoder's floats.
        input_tensor_type, output_tensor_type: `binary`, or `base64` as the first clients had it.
        height, width: of the picture in pixels; for packed latents only.
        fps: frames a second of an mp4; None for the model's own.
        wire_dtype: dtype in which the latents travel; None for their own.
        hints: what the shape and the model's config do not tell; most latents need none.

    Raises:
        BadRequest: naming the argument.
    """

    tensor: torch.Tensor | np.ndarray[Any, Any]
    processor: Any = None
    do_scaling: bool = True
    scaling_factor: float | None = None
    shift_factor: float | None = None
    output_type: OutputType = "pil"
    return_type: OutputType | None = None
    image_format: ImageFormat = "jpg"
    partial_postprocess: bool = False
    input_tensor_type: Transfer = "binary"
    output_tensor_type: Transfer = "binary"
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    wire_dtype: str | None = None
    hints: Hints = field(default_factory=Hints)

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("output_type", self.output_type, ("pil", "pt", "mp4")),
            ("return_type", self.return_type, (None, "pil", "pt", "mp4")),
            ("image_format", self.image_format, ("jpg", "png")),
        ):
            if value not in choices:
                raise BadRequest(f"{name} is {value!r}; expected one of {', '.join(map(str, choices))}", parameter=name)
        if not isinstance(self.do_scaling, (bool, type(None))):
            raise BadRequest(f"do_scaling is {self.do_scaling!r}; expected True or False", parameter="do_scaling")
        for name in ("scaling_factor", "shift_factor", "fps"):
            object.__setattr__(self, name, as_number(float, name, getattr(self, name)))
        for name in ("height", "width"):
            object.__setattr__(self, name, as_number(operator.index, name, getattr(self, name)))
        if self._returns not in self._possible_returns():
            raise BadRequest(
                f"return_type={self._returns!r} cannot be made from output_type={self.output_type!r} "
                "without a processor; pass one, or let return_type be None",
                parameter="return_type",
            )

    @property
    def output(self) -> Output:
        if self.output_type == "mp4":
            return Output.MP4
        if self.output_type == "pt":
            return Output.UINT8 if self.partial_postprocess else Output.PT
        return Output.UNIT if self.processor is not None else Output(self.image_format)

    @property
    def _returns(self) -> OutputType:
        return self.return_type or self._possible_returns()[0]

    def _possible_returns(self) -> tuple[OutputType, ...]:
        if self.output is Output.MP4:
            return ("mp4",)
        if self.output.is_image:
            return ("pil",)
        if self.output is Output.PT and self.processor is None:
            return ("pt",)
        return ("pil", "pt")

    @property
    def host_bytes(self) -> float:
        """Bytes of the latents where they are in this process's memory; infinite elsewhere, whence they have to be fetched."""
        return host_bytes(self.tensor)

    def requests(self) -> list[DecodeRequest]:
        """The requests to send: one, or one for each sample where a reply can hold one image only."""
        whole = DecodeRequest(
            latents=from_array(self.tensor if self.wire_dtype is None else cast(self.tensor, self.wire_dtype)),
            scaling=scaling_of(self.do_scaling, self.scaling_factor, self.shift_factor),
            output=self.output,
            height=self.height,
            width=self.width,
            fps=self.fps,
            hints=self.hints,
            body=self.input_tensor_type,
            reply=self.output_tensor_type,
        )
        axes = len(whole.latents.shape)
        batched = axes == 4 or (axes == 3 and self.height is not None and self.width is not None)
        if not (self.output.is_image and batched and whole.latents.shape[0] > 1):
            return [whole]
        return whole.samples()

    def only_request(self) -> DecodeRequest:
        """The request, where there is one: `as_ref=True` hands on one result. Raises BadRequest."""
        requests = self.requests()
        if len(requests) > 1:
            raise BadRequest(
                "as_ref=True hands on one result, and a batch of images is one result each; "
                "use output_type='pt', or decode the samples one by one",
                parameter="as_ref",
            )
        return requests[0]

    def answer(self, results: Sequence[Result]) -> Decoded:
        """What `decode` returns, from the results of `requests()` in the same order."""
        if self.output.is_image:
            images = [open_image(result) for result in results]
            return images[0] if len(images) == 1 else images
        result = results[0]
        if self.output is Output.MP4:
            if result.media_type != self.output.media_type:
                raise BrokenReply(f"The reply is {result.media_type}, not a video")
            return result.data.tobytes()
        if self._returns == "pt":
            return self._tensor(result.tensor)
        if self.output is Output.UINT8:
            return _one_or_all([Image.fromarray(pixels) for pixels in to_numpy(result.tensor)])
        if self.output is Output.UNIT:
            pixels = to_numpy(result.tensor).astype(np.float32).transpose(0, 2, 3, 1)
            return [Image.fromarray(image) for image in (pixels * 255).round().astype(np.uint8)]
        # VideoProcessor has both, and the 4-D one makes nonsense of a video.
        video = len(result.tensor.shape) == 5 and hasattr(self.processor, "postprocess_video")
        postprocess = self.processor.postprocess_video if video else self.processor.postprocess
        return _one_or_all(postprocess(to_torch(result.tensor), output_type="pil"))

    def _tensor(self, raw: RawTensor) -> torch.Tensor | np.ndarray[Any, Any]:
        """In kind: torch for who sent torch, numpy for who sent numpy."""
        return to_torch(raw) if is_torch(self.tensor) else to_numpy(raw)


def scaling_of(do_scaling: bool | None, factor: float | None, shift: float | None) -> Scaling:
    """The scaling that do_scaling, scaling_factor and shift_factor of the Hugging Face helpers mean together."""
    if not do_scaling:
        return Scaling()
    return Scaling(own=True) if factor is None and shift is None else Scaling(False, factor, shift)


def as_number(kind: Callable[[Any], Any], name: str, value: Any) -> Any:
    """The value as a number of that kind, None as it is; a string is none, however it reads."""
    try:
        return None if value is None else kind(_no_text(value))
    except (TypeError, ValueError):
        raise BadRequest(f"{name} is {value!r}; expected a number", parameter=name) from None


def _no_text(value: Any) -> Any:
    if isinstance(value, (str, bytes, bool)):
        raise TypeError
    return value


def _one_or_all(items: list[Any]) -> Any:
    return items[0] if len(items) == 1 else items


def open_image(result: Result) -> Image.Image:
    """The picture in a result, RGB, or RGBA where the model makes alpha. Raises BrokenReply where there is none."""
    try:
        picture = Image.open(io.BytesIO(result.data.data))
        image = picture.convert("RGBA" if picture.mode == "RGBA" else "RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise BrokenReply(f"The reply is no readable image: {error}") from error
    image.format = (picture.format or "").lower()  # `convert` drops it; the Hugging Face helper sets it
    return image


def open_result(plain: tuple[Any, ...]) -> Decoded:
    """What lies in the plain result that `as_ref=True` refers to, for the actor it was handed on to.

    Returns:
        A PIL image, the bytes of an mp4, or a tensor: torch where torch is imported, else numpy.
    """
    result = Result.from_plain(plain)
    if result.media_type.startswith("image/"):
        return open_image(result)
    if result.media_type == Output.MP4.media_type:
        return result.data.tobytes()
    return to_torch(result.tensor) if "torch" in sys.modules else to_numpy(result.tensor)
