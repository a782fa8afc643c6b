"""Which client gets what from which kind of model: every pair is a cell, and every cell says whether it works.

A client is what its user calls: the installed diffusers helper itself, and for the others what their code does with the reply,
after `wire_clients` wrote the request. `python tests/client_cells.py` writes the table of docs/clients.md.
"""

from __future__ import annotations

import io
import json
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlencode

import requests
import torch
from diffusers.utils import remote_utils
from PIL import Image

import wire_clients
from pipeline_ends import decoder_input, local_pixels
from remote_vae import remote_decode
from samples import latents, tiny_vae
from wire_answers import pixels_of, tensor_of
from wire_clients import Sent

DOCS = Path(__file__).parents[1] / "docs" / "clients.md"
BEGIN, END = "<!-- table: client x model kind -->", "<!-- end of the table -->"
TIMEOUT_S = 300


@lru_cache
def model(name: str) -> Any:
    """The models behind the columns. SDXL is as its authors publish it: a factor, no statistics of latents."""
    vae = tiny_vae("sd" if name == "sdxl" else name, seed=3 if name == "sdxl" else 0)
    if name == "sdxl":
        vae.register_to_config(scaling_factor=0.13025)
    return vae


@dataclass(frozen=True, eq=False)
class Kind:
    """A column: latents as a pipeline puts them out.

    Attributes:
        model: of `model`, which is its path as well.
        z: the latents.
        sizes: height and width in pixels.
    """

    name: str
    model: str
    z: torch.Tensor
    sizes: dict[str, int] = field(default_factory=lambda: {"height": 32, "width": 48})

    @property
    def packed(self) -> bool:
        return self.z.ndim == 3 and self.z.shape[0] == 1

    @property
    def batched(self) -> torch.Tensor:
        return self.z[None] if self.z.ndim == 3 and not self.packed else self.z

    @property
    def needed(self) -> dict[str, int]:
        """What the diffusers helpers ask for with three axes, and nobody needs to say with more."""
        return self.sizes if self.z.ndim == 3 else {}

    @property
    def factors(self) -> dict[str, float]:
        config = model(self.model).config
        shift = getattr(config, "shift_factor", None)
        return {"scaling_factor": config.scaling_factor} | ({} if shift is None else {"shift_factor": shift})

    @property
    def pixels(self) -> torch.Tensor:
        """What the decoder puts out in the model's own pipeline."""
        return local_pixels(self.model, model(self.model), self.batched, **(self.sizes if self.packed else {}))

    @property
    def ready(self) -> torch.Tensor:
        """What the pipeline hands to the decoder, which is what ComfyUI calls a latent; packed and single ones stay so."""
        if self.packed:
            return self.z
        ready: torch.Tensor = decoder_input(self.model, model(self.model), self.batched)
        return ready[0] if self.z.ndim == 3 else ready


KINDS = (
    Kind("SD", "sd", latents(1, 4, 4, 6, seed=1)),
    Kind("SDXL", "sdxl", latents(1, 4, 4, 6, seed=2)),
    Kind("Flux, packed", "flux", latents(1, 6, 64, seed=3)),
    Kind("Flux, `[B, 16, h, w]`", "flux", latents(1, 16, 4, 6, seed=4)),
    Kind("Flux, `[16, h, w]`", "flux", latents(16, 4, 6, seed=5)),
    Kind("HunyuanVideo", "hunyuan", latents(1, 4, 3, 4, 6, seed=6)),
)

Form = Literal["jpg", "png", "pt", "latents"]


@dataclass(frozen=True, eq=False)
class Held:
    """What the client's user holds in the end: a picture, the decoder's output, or latents."""

    form: Form
    value: Any


def post(url: str, sent: Sent) -> requests.Response:
    """As every one of these clients does, unguarded: `.json()` of a response that failed."""
    response = requests.post(url, params=list(sent.query), headers=sent.headers, data=sent.body, timeout=TIMEOUT_S)
    if not response.ok:
        raise RuntimeError(response.json())
    return response


def picture(response: requests.Response) -> Image.Image:
    return Image.open(io.BytesIO(response.content))


def v0(url: str, kind: Kind) -> Held:
    return Held("jpg", picture(post(url, wire_clients.v0(kind.z, **(kind.sizes if kind.packed else {})))))


def v1_base64(url: str, kind: Kind) -> Held:
    sent = wire_clients.v1(kind.z, "tensor/base64", output_type="pt", **kind.needed)
    return Held("pt", tensor_of(post(url, sent), as_base64=True))


def v1_binary(url: str, kind: Kind) -> Held:
    if kind.z.ndim == 5:
        sent = wire_clients.v1(kind.z, "tensor/binary", "binary", output_type="pt")
        return Held("pt", tensor_of(post(url, sent)))
    return Held("png", picture(post(url, wire_clients.v1(kind.z, "image/png", "binary", **kind.needed))))


def diffusers_png(url: str, kind: Kind) -> Held:
    """The installed helper itself, called as its documentation does."""
    return Held("png", remote_utils.remote_decode(url, kind.z, image_format="png", **kind.factors, **kind.needed))


def diffusers_pt(url: str, kind: Kind) -> Held:
    """The installed helper itself, which leaves the scaling to the server; diffusers warns that it will not for ever."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return Held("pt", remote_utils.remote_decode(url, kind.z, output_type="pt", return_type="pt", **kind.needed))


def sd_next(wanted: str) -> Callable[[str, Kind], Held]:
    """SD.Next, by its setting. It takes one sample of a batch at a time, for Flux and HiDream without a batch axis; a video
    has none when it gets there. What is raised here it writes to its log, and decodes on its own."""

    def decode(url: str, kind: Kind) -> Held:
        video = kind.z.ndim == 5
        flux = kind.model == "flux"
        given = kind.z[0] if video else kind.z
        several = given[None] if given.ndim == 3 or video else given
        outcomes = []
        for sample in several:
            latent = sample if flux else sample[None]
            sizes = kind.sizes if flux else {}
            response = post(url, wire_clients.sd_next(latent, wanted, **kind.factors, **sizes, video=video))
            outcomes.append(tensor_of(response) if video or wanted == "raw" else picture(response))
        if video or wanted == "raw":
            return Held("pt", torch.cat(outcomes))
        return Held("png" if wanted == "png" else "jpg", outcomes[0])

    return decode


def comfyui_hf(url: str, kind: Kind) -> Held:
    """ComfyUI-HFRemoteVae, which looks at a fourth axis of every latent."""
    _ = kind.ready.shape[3]
    return Held("pt", tensor_of(post(url, wire_clients.comfyui_hf(kind.ready))))


def comfyui(url: str, kind: Kind) -> Held:
    """ComfyUI-RemoteVAE, whose height and width of a video are wrong."""
    return Held("pt", tensor_of(post(url, wire_clients.comfyui(kind.ready))))


def with_urllib(url: str, kind: Kind) -> Held:
    """A script without `requests`: what its user sees is what it read of the error."""
    params = {"output_type": "pt", "do_scaling": True} | (kind.sizes if kind.packed else {})
    sent = wire_clients.urllib_shape_last(kind.z, **params)
    request = urllib.request.Request(f"{url}?{urlencode(sent.query)}", sent.body, sent.headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            shape = json.loads(response.headers["shape"])
            return Held("pt", torch.frombuffer(bytearray(response.read()), dtype=torch.float32).reshape(shape))
    except urllib.error.HTTPError as error:
        with error:
            raise RuntimeError(json.load(error)["error"]) from None


def ours(url: str, kind: Kind) -> Held:
    sizes = kind.sizes if kind.packed else {}
    return Held("pt", remote_decode(url, kind.z, output_type="pt", **sizes))


PICTURE = Image.fromarray((torch.rand(32, 48, 3, generator=torch.Generator().manual_seed(8)) * 255).byte().numpy())


def encode_picture(url: str, kind: Kind) -> Held:
    """The installed helper itself."""
    return Held("latents", remote_utils.remote_encode(url, PICTURE, **kind.factors))


def encode_tensor(url: str, kind: Kind) -> Held:
    """The installed helper itself. It reads the memory of a tensor that is not contiguous after it was freed: ours is."""
    return Held("latents", remote_utils.remote_encode(url, pixels_of(PICTURE).contiguous(), **kind.factors))


CLIENTS: dict[str, Callable[[str, Kind], Held]] = {
    "first blog, SD.Next of that week (JSON)": v0,
    "the blog's helper, base64": v1_base64,
    "the blog's helper, binary": v1_binary,
    "diffusers `remote_decode`, PNG": diffusers_png,
    "diffusers `remote_decode`, `pt`": diffusers_pt,
    "SD.Next, raw": sd_next("raw"),
    "SD.Next, png": sd_next("png"),
    "SD.Next, jpg": sd_next("jpg"),
    "ComfyUI-HFRemoteVae": comfyui_hf,
    "ComfyUI-RemoteVAE": comfyui,
    "a script with `urllib`": with_urllib,
    "ours": ours,
    "diffusers `remote_encode`, picture": encode_picture,
    "diffusers `remote_encode`, tensor": encode_tensor,
}


@dataclass(frozen=True)
class Refusal:
    """It does not work.

    Attributes:
        says: what the client's user reads, in part.
        why: for the table.
    """

    says: str
    why: str


ONE_PICTURE = Refusal(
    "These latents make a video, and output_type=pil is one image; ask for output_type=mp4",
    "a video is no picture, which is all that this client asks for",
)
NO_FOURTH_AXIS = Refusal("index out of range", "its own code wants four axes or five; ComfyUI has no others")

REFUSALS: dict[tuple[str, str], Refusal] = {
    ("first blog, SD.Next of that week (JSON)", "HunyuanVideo"): ONE_PICTURE,
    ("diffusers `remote_decode`, PNG", "HunyuanVideo"): ONE_PICTURE,
    **{
        (client, kind): NO_FOURTH_AXIS
        for client in ("ComfyUI-HFRemoteVae", "ComfyUI-RemoteVAE")
        for kind in ("Flux, packed", "Flux, `[16, h, w]`")
    },
}
CELLS = [(client, kind) for client in CLIENTS for kind in KINDS]


def table() -> str:
    """The table in Markdown, with a note for each reason."""
    reasons = list(dict.fromkeys(REFUSALS.values()))
    rows = [["client", *(kind.name for kind in KINDS)], ["---"] + [":-:"] * len(KINDS)]
    for client in CLIENTS:
        refusals = [REFUSALS.get((client, kind.name)) for kind in KINDS]
        rows.append([client, *("yes" if one is None else f"no ({reasons.index(one) + 1})" for one in refusals)])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    notes = [f'({number}) {reason.why}: "{reason.says}".' for number, reason in enumerate(reasons, 1)]
    notes.append("The diffusers helpers ask for `height` and `width` wherever latents have three axes.")
    notes.append(
        "An encode gives `[B, C, h, w]`, of a picture for a video model `[1, C, 1, h, w]`; pipelines pack it themselves."
    )
    return "\n".join([*lines, "", "<br>\n".join(notes)])


def with_table(page: str) -> str:
    """The page with the table of today between its marks."""
    before, _, after = page.partition(BEGIN)
    _, end, rest = after.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest if end else after}"


if __name__ == "__main__":
    DOCS.write_text(with_table(DOCS.read_text()))
