"""What each client of the protocol puts on the wire, written as that client writes it: nothing here calls our own code but
`ours`. Those that use `requests` are prepared by `requests`, today's helpers by diffusers itself."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import requests
import torch
from diffusers.utils import remote_utils
from PIL import Image

from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.encode_request import EncodeRequest

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True, eq=False)
class Sent:
    """A request less its path: decoded query pairs in order, headers in lower case, body."""

    query: Pairs = ()
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def but(self, headers: dict[str, str] | None = None, body: bytes | None = None, **query: Any) -> Sent:
        """The same with other headers, another body or other values; a value or a header of None is left out."""
        changed = {name: [value] if isinstance(value, str) else value for name, value in query.items()}
        pairs = [pair for pair in self.query if pair[0] not in changed]
        pairs += [(name, str(value)) for name, values in changed.items() for value in values or ()]
        all_headers = {k: v for k, v in (self.headers | (headers or {})).items() if v is not None}
        return Sent(tuple(pairs), all_headers, self.body if body is None else body)


def prepared(params: dict[str, Any] | None = None, **arguments: Any) -> Sent:
    """What `requests.post(url, params=params, ...)` puts on the wire."""
    request = requests.Request("POST", "http://host/", params=params, **arguments)
    post = requests.Session().prepare_request(request)
    headers = {name.lower(): value for name, value in post.headers.items()}
    body = post.body or b""
    query = tuple(parse_qsl(urlsplit(str(post.url)).query, keep_blank_values=True))
    return Sent(query, headers, body.encode() if isinstance(body, str) else bytes(body))


def about(z: torch.Tensor) -> dict[str, Any]:
    return {"shape": list(z.shape), "dtype": str(z.dtype).split(".")[-1]}


def raw(z: torch.Tensor) -> bytes:
    """Little-endian, in C order: what safetensors' `_tobytes` gave these clients."""
    return z.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def v0(z: torch.Tensor, **parameters: Any) -> Sent:
    """The first blog, and SD.Next of that week: everything in JSON."""
    inputs = base64.b64encode(raw(z)).decode()
    body = {"inputs": inputs, "parameters": about(z) | parameters}
    return prepared(json=body, headers={"Content-Type": "application/json", "Accept": "image/jpeg"})


def v1(
    z: torch.Tensor,
    accept: str = "image/jpeg",
    transfer: str = "base64",
    *,
    do_scaling: bool = True,
    output_type: str = "pil",
    partial_postprocess: bool = False,
    **sizes: int,
) -> Sent:
    """The blog's helper and its copies; base64 is its default, both ways."""
    params = {"do_scaling": do_scaling, "output_type": output_type, "partial_postprocess": partial_postprocess}
    headers = {"Content-Type": f"tensor/{transfer}", "Accept": accept}
    data = raw(z)
    body: dict[str, Any] = (
        {"json": {"inputs": base64.b64encode(data).decode()}} if transfer == "base64" else {"data": data}
    )
    return prepared(params | about(z) | sizes, headers=headers, **body)


def today(z: torch.Tensor, **arguments: Any) -> Sent:
    """`diffusers.utils.remote_utils.remote_decode`, by its own hand."""
    return prepared(**remote_utils.prepare_decode(z, **arguments))


def today_encode(image: torch.Tensor | Image.Image, **arguments: Any) -> Sent:
    """`diffusers.utils.remote_utils.remote_encode`, by its own hand: no Content-Type."""
    return prepared(**remote_utils.prepare_encode(image, **arguments))


def sd_next(
    z: torch.Tensor,
    wanted: str,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
    width: int = 0,
    height: int = 0,
    video: bool = False,
) -> Sent:
    """SD.Next: `wanted` is its setting (raw, png, jpg), which videos override; factors that a config lacks are None."""
    params: dict[str, Any] = {"input_tensor_type": "binary"} | about(z)
    headers = {"Content-Type": "tensor/binary"}
    if video or wanted == "raw":
        params |= {"partial_postprocess": False, "output_type": "pt", "output_tensor_type": "binary"}
        headers["Accept"] = "tensor/binary"
    else:
        params |= {"image_format": wanted, "output_type": "pil"}
        headers["Accept"] = {"png": "image/png", "jpg": "image/jpeg"}[wanted]
    if width > 0 and height > 0:  # Flux and HiDream
        params |= {"width": width, "height": height}
    return prepared(
        params | {"scaling_factor": scaling_factor, "shift_factor": shift_factor}, headers=headers, data=raw(z)
    )


def comfyui_hf(z: torch.Tensor) -> Sent:
    """ComfyUI-HFRemoteVae: a width without a height, so that its copy of the helper sends neither."""
    return v1(z, "tensor/binary", "binary", do_scaling=False, output_type="pt")


def comfyui(z: torch.Tensor) -> Sent:
    """ComfyUI-RemoteVAE, which takes axes 2 and 3 for height and width, those of a video included."""
    return v1(
        z, "tensor/binary", "binary", do_scaling=False, output_type="pt", height=z.shape[2] * 8, width=z.shape[3] * 8
    )


def sampler_grid(z: torch.Tensor, height: int, width: int) -> Sent:
    """A ComfyUI extension that draws grids of samplers: as the nodes, with the right size."""
    return v1(z, "tensor/binary", "binary", do_scaling=False, output_type="pt", height=height, width=width)


def urllib_shape_last(z: torch.Tensor, **params: Any) -> Sent:
    """A script with `urllib.request`, which adds a form's Content-Type where none is set; the shape ends its query."""
    query = urlencode({"dtype": about(z)["dtype"], **params, "shape": list(z.shape)}, doseq=True)
    headers = {"content-type": "tensor/binary", "accept-encoding": "identity", "user-agent": "Python-urllib/3.11"}
    return Sent(tuple(parse_qsl(query)), headers, raw(z))


def curl(
    query: str, body: bytes, content_type: str | None = "application/x-www-form-urlencoded", **headers: str
) -> Sent:
    """`curl --data-binary @file URL?query`; a form's Content-Type is its default, None is `-H 'Content-Type:'`."""
    sent = {"accept": "*/*", "user-agent": "curl/8.5.0"} | {
        name.replace("_", "-"): one for name, one in headers.items()
    }
    if content_type is not None:
        sent["content-type"] = content_type
    return Sent(tuple(parse_qsl(query, keep_blank_values=True)), sent, body)


def ours(request: DecodeRequest | EncodeRequest) -> Sent:
    query, headers, body = request.to_http()
    return Sent(tuple(query), headers, bytes(body))


def file_of(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def in_json(data: bytes, **parameters: Any) -> bytes:
    body = {"inputs": base64.b64encode(data).decode()} | ({"parameters": parameters} if parameters else {})
    return json.dumps(body).encode()
