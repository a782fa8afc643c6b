"""The part of the protocol that encodes pictures and videos, as a table."""

from __future__ import annotations

import io

from PIL import Image

from remote_vae.protocol.encode_request import EncodeRequest, SampleMode
from remote_vae.protocol.tensors import from_array
from remote_vae.protocol.wire import Scaling
from wire_answers import Encodes, pixels_of
from wire_case import (
    CLIP,
    FLUX_FACTORS,
    GREY,
    JPEG,
    ODD,
    PALETTE,
    PIXELS,
    RGB,
    RGBA,
    SD_FACTOR,
    SEEN,
    UINT8,
    WEBP,
    WireCase,
    Z,
    bad,
    unknown_type,
)
from wire_clients import (
    curl,
    file_of,
    in_json,
    ours,
    raw,
    today,
    today_encode,
)  # fmt: skip

ENCODING = [
    *(WireCase(f"diffusers remote_encode PNG, {kind}, at {path}", f"/{kind}{path}", today_encode(RGB), Encodes(SEEN))
      for kind, path in (("sd", "/encode"), ("sd", "/encode/"), ("sd", ""), ("sd", "/"), ("flux", ""), ("sdxl", ""))),
    WireCase("diffusers remote_encode tensor, one URL", "/sd", today_encode(PIXELS), Encodes(PIXELS)),
    WireCase("diffusers remote_encode tensor [3, H, W], one URL", "/sd", today_encode(PIXELS[0]), Encodes(PIXELS)),
    WireCase("diffusers remote_encode tensor at /encode", "/sd/encode", today_encode(PIXELS), Encodes(PIXELS)),
    WireCase("diffusers remote_encode tensor of a video, one URL", "/hunyuan", today_encode(CLIP).but(sample_mode="argmax"),
             Encodes(CLIP, mode="argmax")),
    WireCase("diffusers remote_encode PNG with a factor", "/sd", today_encode(RGB, scaling_factor=SD_FACTOR).but(seed="7"),
             Encodes(SEEN, (SD_FACTOR, None), seed=7)),
    WireCase("diffusers remote_encode PNG with both", "/flux",
             today_encode(RGB, scaling_factor=0.3611, shift_factor=0.1159).but(seed="7"), Encodes(SEEN, FLUX_FACTORS, seed=7)),
    WireCase("diffusers remote_encode PNG with a shift alone", "/sd", today_encode(RGB, shift_factor=0.25).but(seed="7"),
             Encodes(SEEN, (None, 0.25), seed=7)),
    *(WireCase(f"diffusers remote_encode PNG, {picture.mode}, {picture.width} x {picture.height}", "/sd",
               today_encode(picture).but(sample_mode="argmax"), Encodes(pixels_of(picture), mode="argmax"))
      for picture in (RGBA, GREY, GREY.convert("LA"), GREY.convert("1"), PALETTE, ODD)),
    WireCase("curl of a WebP, no Content-Type", "/sd", curl("sample_mode=argmax", WEBP, None), Encodes(SEEN, mode="argmax")),
    *(WireCase(f"curl of a {media}", f"/sd{path}", curl("sample_mode=argmax", file, media), Encodes(pixels, mode="argmax"))
      for media, file, pixels, path in (
          ("image/png", file_of(RGB), SEEN, ""), ("image/webp", WEBP, SEEN, "/encode"),
          ("Image/PNG; q=1", file_of(RGB), SEEN, ""),
          ("application/octet-stream", file_of(RGB), SEEN, ""), ("image/jpeg", file_of(RGB), SEEN, "/encode"))),
    WireCase("curl of a JPEG, no Content-Type", "/sd", curl("sample_mode=argmax", JPEG, None),
             Encodes(pixels_of(Image.open(io.BytesIO(JPEG))), mode="argmax")),
    WireCase("curl of a PNG in JSON", "/sd/encode", curl("sample_mode=argmax", in_json(file_of(RGB)), "application/json"),
             Encodes(SEEN, mode="argmax")),
    *(WireCase(f"ours, {mode.value} of a seed", "/sd/encode",
               ours(EncodeRequest(from_array(PIXELS), sample_mode=mode, seed=11)), Encodes(PIXELS, mode=mode.value, seed=11))
      for mode in SampleMode),
    *(WireCase(f"ours, the model's own scaling, {kind}", f"/{kind}/encode",
               ours(EncodeRequest(from_array(PIXELS), Scaling(own=True), seed=11)), Encodes(PIXELS, "own", seed=11))
      for kind in ("sd", "sdxl", "flux")),
    WireCase("ours, the model's own scaling of a video", "/hunyuan/encode",
             ours(EncodeRequest(from_array(CLIP), Scaling(own=True), seed=11)), Encodes(CLIP, "own", seed=11)),
    WireCase("ours, a picture into a video model", "/hunyuan/encode", today_encode(RGB).but(sample_mode="argmax"),
             Encodes(SEEN[:, :, None], mode="argmax")),
    WireCase("ours, uint8 pixels", "/sd/encode", ours(EncodeRequest(from_array(UINT8), seed=11)), Encodes(SEEN, seed=11)),
    WireCase("ours, base64 both ways", "/sd/encode", ours(EncodeRequest(from_array(PIXELS), seed=11, body="base64",
             reply="base64")),
             Encodes(PIXELS, seed=11, as_base64=True)),
    WireCase("ours, a tiny model, whose encoder has no distribution", "/tiny/encode",
             ours(EncodeRequest(from_array(PIXELS), sample_mode=SampleMode.ARGMAX)), Encodes(PIXELS, mode="argmax")),
    WireCase("do_scaling=False against a factor, encoding", "/sd/encode",
             today_encode(RGB, scaling_factor=2.0).but(do_scaling="False", sample_mode="argmax"), Encodes(SEEN, mode="argmax")),
    WireCase("moments of a tiny model", "/tiny/encode", today_encode(PIXELS).but(sample_mode="moments"),
             bad("sample_mode", "argmax", "model")),
    WireCase("moments, scaled", "/sd/encode", today_encode(PIXELS, scaling_factor=2.0).but(sample_mode="moments"),
             bad("sample_mode")),
    WireCase("sample_mode=best", "/sd/encode", today_encode(RGB).but(sample_mode="best"), bad("sample_mode", "sample, argmax")),
    *(WireCase(f"seed={seed}", "/sd/encode", today_encode(RGB).but(seed=seed), bad("seed")) for seed in ("-1", "x",
             str(2**64))),
    WireCase("latents at /encode", "/sd/encode", today(Z, output_type="pt"), bad("shape", "3 channels", "model")),
    WireCase("pixels at /decode", "/sd/decode", today_encode(PIXELS), bad("shape", r"\[B, 4, h, w\]", "model")),
    WireCase("pixels as tensor/binary at the one URL are latents", "/sd", today(PIXELS, do_scaling=False),
             bad("shape", r"\[B, 4, h, w\]", "model")),
    WireCase("pixels with an output_type at the one URL are latents", "/sd", today_encode(PIXELS).but(output_type="pt"),
             bad("shape", r"\[B, 4, h, w\]", "model")),
    WireCase("a picture at /decode", "/sd/decode", curl("", file_of(RGB), "image/png"), unknown_type("/encode")),
    WireCase("a picture with an output_type at the one URL is no encode", "/sd", curl("output_type=pt", file_of(RGB), None),
             bad("shape", "shape is missing")),
    WireCase("a picture of a type, with an output_type, at the one URL is no encode", "/sd",
             curl("output_type=pil", file_of(RGB), "image/png"), unknown_type("/encode")),
    WireCase("a picture of no known kind", "/sd/encode", curl("", b"GIF89a" + bytes(30), None),
             bad("image", "PNG, JPEG", "model")),
    WireCase("nothing at /encode", "/sd/encode", curl("", b"", None), bad("image", "empty")),
    WireCase("pixels without a dtype", "/sd/encode", today_encode(PIXELS).but(dtype=None), bad("dtype", "dtype is missing")),
    WireCase("pixels of a byte too few", "/sd/encode", today_encode(PIXELS).but(body=raw(PIXELS)[:-1]), bad("shape", "bytes")),
    WireCase("floats of a size that the model cannot take", "/sd/encode", today_encode(PIXELS[..., :30, :]),
             bad("shape", "multiples of 8", "model")),
]  # fmt: skip
