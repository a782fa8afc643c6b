"""The protocol as a table: what each of its clients puts on the wire, and what it must get. `CASES` is what the tests run.

A name begins with the client that sends it. Where no client would, it says what is probed. The sections are the points of the
protocol: routes, query, body, defaults, scaling, shapes, replies, hints, encoding, errors, deadlines and identity.
"""

from __future__ import annotations

from typing import Any

import torch

from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.encode_request import EncodeRequest
from remote_vae.protocol.hints import Hints
from remote_vae.protocol.output import Output
from remote_vae.protocol.tensors import from_array
from remote_vae.protocol.wire import Scaling
from samples import latents
from wire_answers import Decodes, Encodes, Refused, Tells
from wire_case import (
    BATCH,
    BRAIN,
    FLUX,
    FLUX_FACTORS,
    FLUX_ONE,
    FRAMES,
    HALF,
    MAX_BODY,
    PACKED,
    PACKED_SIZES,
    PIXELS,
    PLAIN,
    PLAIN_GIVES,
    RGB,
    SD_FACTOR,
    SEEN,
    VIDEO,
    WireCase,
    Z,
    bad,
    no_route,
    unknown_type,
    wrong_method,
)
from wire_clients import (
    Sent,
    comfyui,
    comfyui_hf,
    curl,
    in_json,
    ours,
    raw,
    sampler_grid,
    sd_next,
    today,
    today_encode,
    urllib_shape_last,
    v0,
    v1,
)  # fmt: skip
from wire_encode_cases import ENCODING

ROUTES = [
    *(WireCase(f"today's helper at {path}", path, PLAIN, PLAIN_GIVES) for path in ("/sd", "/sd/", "/sd/decode", "/sd/decode/")),
    WireCase("v0 blog at the endpoint's root, known by its host", "/", v0(Z).but({"host": "decoder.example.org"}),
             Decodes(Z, "jpg"), model="sd"),
    WireCase("ComfyUI at the endpoint's root, host with a port, in capitals", "/",
             comfyui_hf(Z).but({"host": "DECODER.example.org:8000"}), PLAIN_GIVES, model="sd"),
    WireCase("ComfyUI video at the endpoint's root", "/", comfyui(VIDEO).but({"host": "videos.example.org"}),
             Decodes(VIDEO, "pt", "none", {"height": 24, "width": 32}), model="hunyuan"),
    WireCase("today's remote_encode at the endpoint's root", "/",
             today_encode(RGB).but({"host": "decoder.example.org"}), Encodes(SEEN), model="sd"),
    WireCase("today's helper at a root of no known host", "/", PLAIN.but({"host": "stranger.example.org"}),
             no_route("/models")),
    *(WireCase(f"curl GET {path}", path, Sent(), Tells(keys), "GET") for path, keys in {
        "/sd": ("name", "state"), "/sd/": ("name", "state"), "/models": ("models",), "/models/": ("models",),
        "/health": ("status",), "/health/": ("status",), "/openapi.json": ("openapi", "paths"),
        "/openapi.json/": ("openapi", "paths"),
    }.items()),
    WireCase("ours asks a replica to describe itself", "/sd/describe", Sent(), Tells(("name", "state"))),
    WireCase("ours asks a replica to describe itself, with a slash", "/sd/describe/", Sent(), Tells(("name", "state"))),
]  # fmt: skip

QUERY = [
    WireCase("curl with a JSON list", "/sd", PLAIN.but(shape="[1, 4, 4, 6]"), PLAIN_GIVES),
    WireCase("curl with a comma list", "/sd", PLAIN.but(shape="1,4,4,6"), PLAIN_GIVES),
    WireCase("urllib, shape last", "/sd", urllib_shape_last(Z, do_scaling=False, output_type="pt"), PLAIN_GIVES),
    WireCase("urllib, shape last, nothing but shape and dtype", "/sd", urllib_shape_last(Z), Decodes(Z, "jpg", "none")),
    *(WireCase(f"a script that writes do_scaling={word}", "/sd", PLAIN.but(do_scaling=word), Decodes(Z, "pt", gives))
      for word, gives in {"true": "own", "TRUE": "own", "True": "own", "1": "own",
                          "false": "none", "FALSE": "none", "False": "none", "0": "none"}.items()),
    WireCase("a script that writes partial_postprocess=TRUE", "/sd", PLAIN.but(partial_postprocess="TRUE"),
             Decodes(Z, "uint8", "none")),
    WireCase("a client of the future, whose keys mean nothing here", "/sd",
             PLAIN.but(from_the_future="{}", input_tensor_type="binary", output_tensor_type="binary", stream="false"),
             PLAIN_GIVES),
    WireCase("a script that writes output_type=PT", "/sd", PLAIN.but(output_type="PT"), PLAIN_GIVES),
]  # fmt: skip

BODY = [
    *(WireCase(f"today's helper with {str(z.dtype)[6:]}", "/sdxl", today(z, output_type="pt"), Decodes(z, "pt"))
      for z in (Z, HALF, BRAIN)),
    WireCase("a body of a byte too few", "/sd", PLAIN.but(body=PLAIN.body[:-1]), bad("shape", "383 bytes.*384")),
    WireCase("a body of a byte too many", "/sd", PLAIN.but(body=PLAIN.body + b"\0"), bad("shape", "385 bytes.*384")),
    WireCase("no body", "/sd", PLAIN.but(body=b""), bad("shape", "0 bytes.*384")),
    WireCase("a body of half the dtype", "/sd", PLAIN.but(dtype="float16"), bad("shape", "384 bytes.*192")),
    *(WireCase(f"a dtype of {dtype}", "/sd", PLAIN.but(dtype=dtype), bad("dtype", "float16, float32, bfloat16"))
      for dtype in ("float64", "int8", "")),
    WireCase("a dtype of uint8, which is no latent", "/sd", PLAIN.but(dtype="uint8", body=PLAIN.body[:96]),
             bad("dtype", "float16, float32, bfloat16")),
    *(WireCase(f"Content-Type {written!r}", "/sd", PLAIN.but({"content-type": written}), PLAIN_GIVES)
      for written in ("Tensor/Binary", "tensor/binary; charset=utf-8", "TENSOR/BINARY ;x=y", "application/octet-stream")),
    WireCase("curl without a Content-Type", "/sd", curl("shape=1,4,4,6&dtype=float32&output_type=pt", raw(Z), None),
             PLAIN_GIVES),
    WireCase("Content-Type 'Tensor/BASE64; charset=utf-8'", "/sd",
             v1(Z, "image/png").but({"content-type": "Tensor/BASE64; charset=utf-8"}), Decodes(Z, "png")),
    WireCase("Content-Type 'Application/JSON;charset=UTF-8'", "/sd",
             v0(Z).but({"content-type": "Application/JSON;charset=UTF-8"}), Decodes(Z, "jpg")),
    *(WireCase(f"curl of {media}", "/sd", PLAIN.but({"content-type": media}), unknown_type(media.partition(";")[0]))
      for media in ("application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain",
      "application/pickle")),
    WireCase("curl --data-binary with the type that it adds by itself", "/sd", curl("shape=1,4,4,6&dtype=float32", raw(Z)),
             unknown_type("tensor/binary")),
    WireCase("base64 that is none", "/sd", v1(Z).but(body=b'{"inputs": "?"}'), bad("inputs")),
    WireCase("base64 of a byte too few", "/sd", v1(Z).but(body=in_json(raw(Z)[:-1])), bad("shape", "383 bytes.*384")),
    WireCase("v0 without inputs", "/sd", v0(Z).but(body=b'{"parameters": {}}'), bad("inputs")),
    WireCase("v0 of a byte too few", "/sd", v0(Z).but(body=in_json(raw(Z)[:-1], shape=[1, 4, 4, 6], dtype="float32")),
             bad("shape", "383 bytes.*384")),
    WireCase("v1 helper whose JSON is sent as tensor/binary", "/sd", v1(Z).but({"content-type": "tensor/binary"}),
             bad("shape", "bytes")),
]  # fmt: skip

DEFAULTS = [
    WireCase("no shape", "/sd", PLAIN.but(shape=None), bad("shape", "shape is missing")),
    WireCase("no dtype", "/sd", PLAIN.but(dtype=None), bad("dtype", "dtype is missing")),
    WireCase("v0 without parameters", "/sd", v0(Z).but(body=in_json(raw(Z))), bad("shape", "shape is missing")),
    *(WireCase(f"shape and dtype alone, Accept {accept}", "/sd",
               curl("shape=1,4,4,6&dtype=float32", raw(Z), "tensor/binary", accept=accept), Decodes(Z, form, "none"))
      for accept, form in {"*/*": "jpg", "image/png": "png", "image/jpeg": "jpg", "IMAGE/PNG;q=0.9, */*": "png",
                           "image/webp": "jpg", "text/html, image/png": "png", "tensor/binary": "unit"}.items()),
    WireCase("shape and dtype alone, no Accept", "/sd",
             Sent((("shape", "1,4,4,6"), ("dtype", "float32")), {"content-type": "tensor/binary"}, raw(Z)),
             Decodes(Z, "jpg", "none")),
    WireCase("v1 helper, which sends no image_format: Accept says png", "/sd", v1(Z, "image/png", "binary"), Decodes(Z, "png")),
    WireCase("image_format against Accept", "/sd", today(Z, do_scaling=False, image_format="png").but({"accept": "image/jpeg"}),
             Decodes(Z, "png", "none")),
    WireCase("image_format=jpeg, in full", "/sd", today(Z, do_scaling=False).but({"accept": "image/png"}, image_format="jpeg"),
             Decodes(Z, "jpg", "none")),
    WireCase("image_format=gif", "/sd", PLAIN.but(image_format="gif"), bad("image_format", "jpg")),
    WireCase("output_type=gif", "/sd", PLAIN.but(output_type="gif"), bad("output_type", "pil, pt, mp4")),
]  # fmt: skip

SCALING = [
    WireCase("v0 blog, latents as the pipeline left them", "/sd", v0(HALF), Decodes(HALF, "jpg")),
    WireCase("v0 blog with SDXL's statistics", "/sdxl", v0(Z), Decodes(Z, "jpg")),
    WireCase("SD.Next v0 week, Flux packed", "/flux", v0(PACKED, **PACKED_SIZES), Decodes(PACKED, "jpg", "own", PACKED_SIZES)),
    WireCase("v0 blog that says do_scaling=False", "/sd", v0(Z, do_scaling=False), Decodes(Z, "jpg", "none")),
    WireCase("v0 blog with a factor", "/sd", v0(Z, scaling_factor=0.5), Decodes(Z, "jpg", (0.5, None))),
    *(WireCase(f"today's helper, do_scaling=True, {kind}", f"/{kind}", today(z, output_type="pt", **sizes),
               Decodes(z, "pt", "own", sizes))
      for kind, z, sizes in (("sd", Z, {}), ("sdxl", Z, {}), ("flux", PACKED, PACKED_SIZES), ("tiny", Z, {}),
                             ("hunyuan", VIDEO, {}))),
    *(WireCase(f"today's helper, do_scaling=False, {kind}", f"/{kind}", today(z, do_scaling=False, output_type="pt"),
               Decodes(z, "pt", "none")) for kind, z in (("sd", Z), ("sdxl", Z), ("flux", FLUX), ("hunyuan", VIDEO))),
    WireCase("today's helper with a factor", "/sd", today(Z, scaling_factor=SD_FACTOR, output_type="pt"),
             Decodes(Z, "pt", (SD_FACTOR, None))),
    WireCase("today's helper with a factor, the statistics of SDXL left out", "/sdxl",
             today(Z, scaling_factor=0.13025, output_type="pt"), Decodes(Z, "pt", (0.13025, None))),
    WireCase("today's helper with both", "/flux",
             today(PACKED, scaling_factor=0.3611, shift_factor=0.1159, output_type="pt", **PACKED_SIZES),
             Decodes(PACKED, "pt", FLUX_FACTORS, PACKED_SIZES)),
    WireCase("today's helper with a shift alone, which says do_scaling=True beside it", "/sd",
             today(Z, shift_factor=0.25, output_type="pt"), Decodes(Z, "pt", (None, 0.25))),
    WireCase("do_scaling=False against a factor", "/sd", PLAIN.but(do_scaling="False", scaling_factor="2", shift_factor="1"),
             PLAIN_GIVES),
    WireCase("do_scaling=True beside a factor", "/sd", PLAIN.but(do_scaling="True", scaling_factor="2"),
             Decodes(Z, "pt", (2.0, None))),
    WireCase("v1 helper, do_scaling=False", "/sd", v1(Z, "tensor/binary", "binary", do_scaling=False,
             output_type="pt"), PLAIN_GIVES),
    WireCase("v1 helper base64, do_scaling=True", "/sdxl", v1(Z, "tensor/base64", output_type="pt"),
             Decodes(Z, "pt", as_base64=True)),
    WireCase("v1 base64 that says nothing of scaling", "/sd",
             v1(Z, "tensor/base64", output_type="pt").but(do_scaling=None), Decodes(Z, "pt", "none", as_base64=True)),
    *(WireCase(f"{name}={value}", "/sd", PLAIN.but(**{name: value}), bad(name))
      for name, value in (("scaling_factor", "0"), ("scaling_factor", "nan"), ("scaling_factor", "inf"),
      ("scaling_factor", "x"),
                          ("scaling_factor", "None"), ("shift_factor", "nan"), ("shift_factor", ""), ("do_scaling", "maybe"))),
]  # fmt: skip

SHAPES = [
    WireCase("ComfyUI HF-nodes image", "/flux", comfyui_hf(FLUX), Decodes(FLUX, "pt", "none")),
    WireCase("ComfyUI HF-nodes video", "/hunyuan", comfyui_hf(VIDEO), Decodes(VIDEO, "pt", "none")),
    WireCase("ComfyUI image, 4-D Flux latents with height and width", "/flux", comfyui(FLUX),
             Decodes(FLUX, "pt", "none", PACKED_SIZES)),
    WireCase("ComfyUI video (5-D with wrong height and width)", "/hunyuan", comfyui(VIDEO),
             Decodes(VIDEO, "pt", "none", {"height": 24, "width": 32})),
    WireCase("ComfyUI video into an image model, decoded frame by frame", "/sd", comfyui(FRAMES),
             Decodes(FRAMES, "pt", "none", {"height": 16, "width": 32})),
    WireCase("sampler grid", "/sdxl", sampler_grid(Z, 32, 48), Decodes(Z, "pt", "none", {"height": 32, "width": 48})),
    WireCase("4-D latents with a size of nonsense", "/flux", comfyui(FLUX).but(height="1", width="99"),
             Decodes(FLUX, "pt", "none", {"height": 1, "width": 99})),
    WireCase("v1 helper, packed with do_scaling=False: the shape decides", "/flux",
             v1(PACKED, "tensor/binary", "binary", do_scaling=False, output_type="pt", **PACKED_SIZES),
             Decodes(PACKED, "pt", "none", PACKED_SIZES)),
    WireCase("today's helper, packed, a size that no token divides", "/flux",
             today(PACKED, output_type="pt", height=47, width=63), Decodes(PACKED, "pt", "own", {"height": 47, "width": 63})),
    WireCase("SD.Next raw, Flux packed", "/flux", sd_next(PACKED, "raw", *FLUX_FACTORS, 48, 32),
             Decodes(PACKED, "pt", FLUX_FACTORS, PACKED_SIZES)),
    WireCase("SD.Next raw, Flux or HiDream unpacked: [C, h, w] with the size in pixels", "/flux",
             sd_next(FLUX_ONE, "raw", *FLUX_FACTORS, 48, 32), Decodes(FLUX_ONE, "pt", FLUX_FACTORS, PACKED_SIZES)),
    WireCase("a script with one sample [C, h, w]", "/flux", today(FLUX_ONE, do_scaling=False, output_type="pt"),
             Decodes(FLUX_ONE, "pt", "none")),
    WireCase("a script with one sample [C, h, w] of SD", "/sd", today(Z[0], output_type="pt"), Decodes(Z[0], "pt")),
    WireCase("today's helper, a batch", "/sd", today(BATCH, output_type="pt"), Decodes(BATCH, "pt")),
    WireCase("today's helper, frames into an image model", "/sd", today(FRAMES, output_type="pt"), Decodes(FRAMES, "pt")),
    WireCase("packed without a size", "/flux", today(PACKED, output_type="pt"),
             bad("height", r"\[16, h, w\].*height and width", "model")),
    WireCase("packed without a width", "/flux", today(PACKED, output_type="pt").but(height="32"),
             bad("width", "width", "model")),
    WireCase("packed with a wrong size", "/flux", today(PACKED, output_type="pt", height=64, width=48),
             bad("height", "12.*6|6.*12", "model")),
    WireCase("packed with tokens of another width", "/flux", today(latents(1, 6, 32), output_type="pt", **PACKED_SIZES),
             bad("shape", "64", "model")),
    WireCase("latents of SD for Flux", "/flux", today(Z, output_type="pt"), bad("shape", r"\[B, 16, h, w\]", "model")),
    WireCase("latents of Flux for SD", "/sd", today(FLUX, output_type="pt"), bad("shape", r"\[B, 4, h, w\]", "model")),
    WireCase("channels last", "/sd", PLAIN.but(shape="1,6,4,4"), bad("shape", r"\[B, 4, h, w\]", "model")),
    WireCase("an image for a video model", "/hunyuan", today(Z, output_type="pt"), bad("shape", r"\[B, 4, T, h, w\]", "model")),
    WireCase("two axes", "/sd", PLAIN.but(shape="4,24"), bad("shape", r"\[B, 4, h, w\]", "model")),
    *(WireCase(f"shape={shape}", "/sd", PLAIN.but(shape=shape), bad("shape"))
      for shape in ("0,4,4,6", "-1,4,-4,6", "one", "", "1,4,4.0,6", "4611686018427387904,4,4,6")),
    *(WireCase(f"height={height}", "/flux", today(PACKED, **PACKED_SIZES).but(height=height), bad("height"))
      for height in ("0", "-8", "tall", "4294967296")),
]  # fmt: skip

REPLIES = [
    *(WireCase(f"today's helper, {form}, {kind}", f"/{kind}", today(z, image_format=form, **sizes),
             Decodes(z, form, "own", sizes))
      for form in ("jpg", "png") for kind, z, sizes in (("sd", Z, {}), ("sdxl", Z, {}), ("flux", PACKED, PACKED_SIZES))),
    *(WireCase(f"SD.Next {form}", "/sd", sd_next(Z, form, SD_FACTOR),
             Decodes(Z, "pt" if form == "raw" else form, (SD_FACTOR, None)))
      for form in ("raw", "png", "jpg")),
    WireCase("SD.Next video", "/hunyuan", sd_next(VIDEO, "jpg", 0.476986, video=True), Decodes(VIDEO, "pt", (0.476986, None))),
    WireCase("v1 helper base64, JPEG back", "/sd", v1(Z), Decodes(Z, "jpg")),
    WireCase("v1 helper base64, tensor back", "/sd", v1(Z, "tensor/base64", output_type="pt"),
             Decodes(Z, "pt", as_base64=True)),
    WireCase("v1 helper base64, uint8 back", "/sd", v1(Z, "tensor/base64", output_type="pt", partial_postprocess=True),
             Decodes(Z, "uint8", as_base64=True)),
    WireCase("v1 helper base64, a processor's floats back", "/sd", v1(Z, "tensor/base64"), Decodes(Z, "unit", as_base64=True)),
    WireCase("v1 helper base64 there, binary back", "/sd", v1(Z, "tensor/binary", output_type="pt"), Decodes(Z, "pt")),
    WireCase("v1 helper binary there, base64 back", "/sd", v1(Z, "tensor/base64", "binary", output_type="pt"),
             Decodes(Z, "pt", as_base64=True)),
    WireCase("v1 helper binary, tensor back", "/sd", v1(Z, "tensor/binary", "binary", output_type="pt"), Decodes(Z, "pt")),
    WireCase("v1 helper base64, mp4 back", "/hunyuan", v1(VIDEO, "text/plain", output_type="mp4"), Decodes(VIDEO, "mp4")),
    WireCase("today's helper, mp4", "/hunyuan", today(VIDEO, output_type="mp4"), Decodes(VIDEO, "mp4")),
    WireCase("today's helper, mp4 of frames of an image model", "/sd", today(FRAMES, output_type="mp4"),
             Decodes(FRAMES, "mp4")),
    WireCase("ours, mp4 at a rate", "/hunyuan",
             ours(DecodeRequest(from_array(VIDEO), Scaling(own=True), Output.MP4, fps=12)), Decodes(VIDEO, "mp4", fps=12)),
    WireCase("today's helper with a processor", "/sd", today(Z, processor=object()), Decodes(Z, "unit")),
    WireCase("today's helper with a processor, a batch", "/sd", today(BATCH, processor=object()), Decodes(BATCH, "unit")),
    WireCase("today's helper with a processor, a video", "/hunyuan", today(VIDEO, processor=object()), Decodes(VIDEO, "unit")),
    WireCase("today's helper, pt with partial_postprocess", "/sd", today(BATCH, output_type="pt", partial_postprocess=True),
             Decodes(BATCH, "uint8")),
    WireCase("today's helper, pt with partial_postprocess, a video", "/hunyuan",
             today(VIDEO, output_type="pt", partial_postprocess=True), Decodes(VIDEO, "uint8")),
    WireCase("pt with an image Accept: output_type wins", "/sd", PLAIN.but({"accept": "image/png"}), PLAIN_GIVES),
    WireCase("mp4 with a tensor Accept: output_type wins", "/hunyuan",
             today(VIDEO, output_type="mp4").but({"accept": "tensor/binary"}), Decodes(VIDEO, "mp4")),
    *(WireCase(f"ours, {form}", "/sd", ours(DecodeRequest(from_array(Z), Scaling(own=True), output)), Decodes(Z, form))
      for form, output in {"jpg": Output.JPEG, "png": Output.PNG, "pt": Output.PT, "uint8": Output.UINT8,
      "unit": Output.UNIT}.items()),
    WireCase("today's helper, an image of a video", "/hunyuan", today(VIDEO), bad("output_type", "mp4.*processor", "model")),
    WireCase("today's helper, an image of frames", "/sd", today(FRAMES), bad("output_type", "mp4.*processor", "model")),
    WireCase("today's helper, one image of a batch", "/sd", today(BATCH),
             bad("shape", "one.*output_type=pt.*partial_postprocess", "model")),
    WireCase("today's helper, mp4 of an image", "/sd", today(Z, output_type="mp4"), bad("output_type", "videos", "model")),
    *(WireCase(f"fps={fps}", "/hunyuan", today(VIDEO, output_type="mp4").but(fps=fps), bad("fps"))
      for fps in ("0", "nan", "fast", "1000")),
]  # fmt: skip

EVERY_HINT: dict[str, Any] = {
    "num_frames": 9, "layers": 1, "drop_frames": 0, "layout": "channels_first", "patch_order": "c_ph_pw", "denormalized": False,
    "sigma_data": 0.5, "decode_timestep": 0.05, "decode_noise_scale": 0.025, "decode_chunk_size": 14, "force_not_quantize": True,
}  # fmt: skip
OF_SD: dict[str, Any] = {name: EVERY_HINT[name] for name in ("layout", "patch_order", "denormalized")}
NO_HINTS = {
    "num_frames": ("0", "-9", "9.5", "many", "", "1048577", "9,9"), "layers": ("0", "x"), "drop_frames": ("-1", "one"),
    "layout": ("", "last", "channels_last,frames_first"), "patch_order": ("c_pw_ph",), "denormalized": ("yes", "2", ""),
    "sigma_data": ("0", "-1", "nan", "inf", "half"), "decode_timestep": ("-0.1", "1.5", "nan"),
    "decode_noise_scale": ("1.01", "loud"), "decode_chunk_size": ("0", "1e3"), "force_not_quantize": ("maybe",),
}  # fmt: skip

HINTS = [
    WireCase("ours, every hint that means something to the model", "/sd",
             ours(DecodeRequest(from_array(Z), Scaling(own=True), Output.PT, hints=Hints(**OF_SD, seed=7))),
             Decodes(Z, "pt")),
    *(WireCase(f"{name} to a model that has no use for it", "/sd", PLAIN.but(**{name: str(value)}),
               bad(name, "means nothing", by="model"))
      for name, value in EVERY_HINT.items() if name not in OF_SD),
    WireCase("ours, every hint with a picture", "/sd/encode",
             ours(EncodeRequest(from_array(PIXELS), seed=11, hints=Hints(**EVERY_HINT))), Encodes(PIXELS, seed=11)),
    WireCase("v0 with hints in its JSON", "/sd", v0(Z, denormalized=False, num_frames=None, seed=3), Decodes(Z, "jpg")),
    WireCase("v0 of before diffusers' spelling, hints in its JSON", "/sd", v0(Z, denormalised=False), Decodes(Z, "jpg")),
    *(WireCase(f"{kind} with denormalised={value}", f"/sd{path}", sent.but(denormalised=value), gives)
      for kind, path, sent, right in (("ours of before diffusers' spelling", "", PLAIN, PLAIN_GIVES),
                                      ("the same, encoding", "/encode", today_encode(PIXELS).but(seed="1"),
                                       Encodes(PIXELS, seed=1)))
      for value, gives in (("False", right), ("maybe", bad("denormalised", "expected true or false")))),
    WireCase("one that sends both spellings", "/sd", PLAIN.but(denormalised="False", denormalized="false"), PLAIN_GIVES),
    WireCase("one that sends both spellings and contradicts itself", "/sd", PLAIN.but(denormalised="True", denormalized="False"),
             bad("denormalized", "differ")),
    WireCase("a client of the new spelling alone", "/sd", PLAIN.but(denormalized="False"), PLAIN_GIVES),
    WireCase("the same, encoding with the new spelling", "/sd/encode",
             today_encode(PIXELS).but(seed="1", denormalized="False"), Encodes(PIXELS, seed=1)),
    WireCase("a script that writes LAYOUT=Channels_First", "/sd", PLAIN.but(layout="Channels_First"), PLAIN_GIVES),
    *(WireCase(f"{name}={value}", "/sd", PLAIN.but(**{name: value}), bad(name, "expected"))
      for name, values in NO_HINTS.items() for value in values),
    *(WireCase(f"{name}={values[0]}, encoding", "/sd/encode", today_encode(RGB).but(**{name: values[0]}), bad(name, "expected"))
      for name, values in NO_HINTS.items()),
    *(WireCase(f"seed={seed}, decoding", "/sd", PLAIN.but(seed=seed), bad("seed")) for seed in ("-1", "x", str(2**64))),
    WireCase("v0 with a hint that is none", "/sd", v0(Z, num_frames="many"), bad("num_frames", "expected")),
]  # fmt: skip

ERRORS = [
    WireCase("a model that is not here", "/nobody", PLAIN, Refused(404, "unknown_model", "model", "sd", "app")),
    WireCase("a GET of a model that is not here", "/nobody", Sent(),
             Refused(404, "unknown_model", "model", "sd", "app"), "GET"),
    *(WireCase(f"{method} {path}", path, Sent(), no_route("/models"), method)
      for method, path in (("GET", "/"), ("POST", "/sd/train"), ("POST", "/sd/decode/more"), ("GET", "/sd/encode/more"))),
    *(WireCase(f"{method} {path}", path, Sent(), wrong_method(method), method)
      for method, path in (("GET", "/sd/decode"), ("GET", "/sd/encode/"), ("PUT", "/sd"), ("DELETE", "/sd/"), ("PATCH", "/sd"),
                           ("OPTIONS", "/sd"), ("POST", "/models"), ("POST", "/health"), ("POST", "/openapi.json"),
                           ("GET", "/sd/describe"))),
    WireCase("a body over the limit", "/sd", PLAIN.but(body=bytes(MAX_BODY + 1)),
             Refused(413, "body_too_large", "body", str(MAX_BODY), "app")),
    WireCase("a body over the limit at /encode", "/sd/encode", PLAIN.but(body=bytes(MAX_BODY + 1)),
             Refused(413, "body_too_large", "body", str(MAX_BODY), "app")),
    WireCase("NaN in the latents", "/sd", today(torch.full_like(Z, torch.nan), output_type="pt"),
             bad("tensor", "NaN", "model")),
    WireCase("a model that starts", "/starting", PLAIN, Refused(503, "model_starting", None, "again", "app", retry_after=True)),
    WireCase("a model that is busy", "/busy", PLAIN, Refused(503, "overloaded", None, "full", "app", retry_after=True)),
    WireCase("a model that cannot be loaded", "/failed/encode", PLAIN,
             Refused(503, "model_failed", None, "weights", "app", retry_after=True)),
    WireCase("a model that crashes", "/broken", PLAIN, Refused(500, "internal_error", None, "request id", "app")),
]  # fmt: skip

DEADLINES = [
    WireCase("ours with a deadline that is met", "/sd", PLAIN.but({"x-vae-deadline-ms": "15000"}), PLAIN_GIVES),
    WireCase("ours with a deadline that is met, encoding", "/sd/encode",
             today_encode(PIXELS).but({"x-vae-deadline-ms": "15000"}, seed="1"), Encodes(PIXELS, seed=1)),
    WireCase("ours with a deadline beyond the server's", "/sd", PLAIN.but({"x-vae-deadline-ms": "86400000"}), PLAIN_GIVES),
    WireCase("ours with a deadline that passes", "/slow", PLAIN.but({"x-vae-deadline-ms": "60"}),
             Refused(504, "deadline_exceeded", None, "60 ms", "app")),
    *(WireCase(f"x-vae-deadline-ms: {sent}", "/sd", PLAIN.but({"x-vae-deadline-ms": sent}),
             bad("x-vae-deadline-ms", "milliseconds"))
      for sent in ("0", "-5", "1.5", "soon", "1e3", "")),
]  # fmt: skip

IDENTITY = [
    WireCase("a client that numbers its requests", "/sd", PLAIN.but({"x-request-id": "mine-1"}), PLAIN_GIVES),
    WireCase("a client that numbers its requests, and is refused", "/sd",
             PLAIN.but({"x-request-id": "mine-1"}, shape=None), bad("shape")),
    WireCase("a token in the URL where none is asked for", "/sd", PLAIN.but({"authorization": "Basic OlRPS0VO"}), PLAIN_GIVES),
]  # fmt: skip

CASES: dict[str, WireCase] = {}
_SECTIONS = (ROUTES, QUERY, BODY, DEFAULTS, SCALING, SHAPES, REPLIES, HINTS, ENCODING, ERRORS, DEADLINES, IDENTITY)
for _case in (case for section in _SECTIONS for case in section):
    assert _case.name not in CASES, _case.name
    CASES[_case.name] = _case
