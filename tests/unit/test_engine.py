"""A real engine on tiny random weights: bit for bit what diffusers does with them in the same process."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderOobleck, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from safetensors.torch import load_file, save_file

from in_process import diffusers_engine, fake_engine, pipeline_of
from pipeline_ends import decoder_input, local_pixels
from remote_vae.errors import BadRequest, ModelFailed
from remote_vae.protocol.decode_request import DecodeRequest
from remote_vae.protocol.encode_request import SampleMode
from remote_vae.protocol.output import Output
from remote_vae.protocol.result import Result
from remote_vae.protocol.tensors import RawTensor, from_array, to_numpy, to_torch
from remote_vae.protocol.wire import Scaling
from remote_vae_serve.codecs.jpeg import JPEG_QUALITY
from remote_vae_serve.engine.diffusers_engine import DiffusersEngine
from samples import IMAGE_KINDS, KINDS, latents, samples_of, save_tiny_vae, tiny_vae

CASES = [(kind, layout) for kind in KINDS for layout in samples_of(kind)]
OWN = Scaling(own=True)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    for kind in KINDS:
        save_tiny_vae(kind, folder / kind)
    return folder


def run(engine: DiffusersEngine, z: torch.Tensor, output: Output, scaling: Scaling = OWN, **sizes: int) -> Result:
    """One request through the whole replica, less Ray."""
    pipeline = pipeline_of(engine)
    try:
        return asyncio.run(pipeline.decode(DecodeRequest(from_array(z), scaling, output, **sizes)))
    finally:
        pipeline.close()


def image_of(result: Result) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(result.data.tobytes())))


def images_in(pixels: torch.Tensor) -> torch.Tensor:
    """`[N, 3, H, W]`: images as they are, the frames of one video."""
    return pixels[0].transpose(0, 1) if pixels.ndim == 5 else pixels


def uint8_of(pixels: torch.Tensor) -> np.ndarray[Any, Any]:
    """What the pipelines' image processor makes of them."""
    return np.stack(
        [np.asarray(image) for image in VaeImageProcessor().postprocess(images_in(pixels), output_type="pil")]
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_every_output_is_what_the_pipeline_makes_of_the_same_latents(
    folders: Path, kind: str, layout: str, dtype: str
) -> None:
    engine = diffusers_engine(folders / kind, dtype=dtype)
    vae = tiny_vae(kind).to(getattr(torch, dtype))
    z, sizes = samples_of(kind)[layout]
    z = z.to(vae.dtype)
    batched = z[None] if z.ndim == 3 and not sizes else z
    expected = local_pixels(kind, vae, batched, **sizes)
    if layout == "frames":  # the engine decodes them as one batch
        folded = z.transpose(1, 2).flatten(0, 1)
        expected = local_pixels(kind, vae, folded).unflatten(0, (1, -1)).transpose(1, 2)

    pt = to_torch(run(engine, z, Output.PT, **sizes).tensor)
    assert pt.dtype == vae.dtype
    assert torch.equal(pt, expected)
    uint8 = to_numpy(run(engine, z, Output.UINT8, **sizes).tensor)
    np.testing.assert_array_equal(uint8, uint8_of(expected))
    assert uint8.min() < 32
    assert uint8.max() > 223  # otherwise the clamp was not tested
    unit = to_torch(run(engine, z, Output.UNIT, **sizes).tensor)
    assert torch.equal(unit, VaeImageProcessor().postprocess(images_in(expected), output_type="pt"))
    if expected.ndim == 4:
        np.testing.assert_array_equal(image_of(run(engine, z, Output.PNG, **sizes)), uint8_of(expected)[0])


def test_a_jpeg_is_as_good_as_pillows_of_the_same_pixels(folders: Path) -> None:
    engine = diffusers_engine(folders / "sd")
    z, _ = samples_of("sd")["images"]
    pixels = uint8_of(local_pixels("sd", tiny_vae("sd"), z))[0]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=JPEG_QUALITY)
    result = run(engine, z, Output.JPEG)
    assert result.media_type == "image/jpeg"
    with Image.open(io.BytesIO(result.data)) as ours, Image.open(file) as pillows:
        assert ours.quantization == pillows.quantization
        assert ours.layer == pillows.layer  # half the colour along each edge
        errors = [np.square(np.asarray(image).astype(float) - pixels).mean() for image in (ours, pillows)]
    assert errors[0] < 1.05 * errors[1]  # a fifth of a decibel


@pytest.mark.parametrize(
    "scaling", [Scaling(), Scaling(factor=0.7), Scaling(shift=0.3), Scaling(factor=0.7, shift=0.3)]
)
@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_what_the_client_says_of_scaling_takes_the_place_of_the_models_own(
    folders: Path, kind: str, scaling: Scaling
) -> None:
    engine = diffusers_engine(folders / kind)
    z, _ = samples_of(kind)["images"]
    with torch.inference_mode():
        expected = tiny_vae(kind).decode(z / (scaling.factor or 1) + (scaling.shift or 0)).sample
    assert torch.equal(to_torch(run(engine, z, Output.PT, scaling).tensor), expected)


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_a_batch_is_decoded_as_one_and_no_sample_leaks_into_another(folders: Path, kind: str) -> None:
    engine = diffusers_engine(folders / kind)
    z, _ = samples_of(kind, batch=3)["images"]
    whole = to_torch(run(engine, z, Output.PT).tensor)
    assert torch.equal(whole, local_pixels(kind, tiny_vae(kind), z))
    one_by_one = torch.cat([to_torch(run(engine, sample[None], Output.PT).tensor) for sample in z])
    torch.testing.assert_close(whole, one_by_one, rtol=0, atol=2e-5)


def test_every_video_of_a_batch_keeps_its_frames(folders: Path) -> None:
    engine = diffusers_engine(folders / "sd")
    z = latents(2, 4, 3, 4, 4)
    videos = to_torch(run(engine, z, Output.PT).tensor)
    torch.testing.assert_close(videos, local_pixels("sd", tiny_vae("sd"), z), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_narrow_latents_are_widened_before_they_are_scaled(folders: Path, kind: str, dtype: torch.dtype) -> None:
    engine = diffusers_engine(folders / kind)
    z = samples_of(kind)["images"][0].to(dtype)
    expected = local_pixels(kind, tiny_vae(kind), z.float())
    assert torch.equal(to_torch(run(engine, z, Output.PT).tensor), expected)


def test_wide_latents_are_scaled_before_they_are_narrowed(folders: Path) -> None:
    engine = diffusers_engine(folders / "sdxl", dtype="bfloat16")
    z, _ = samples_of("sdxl")["images"]
    vae = tiny_vae("sdxl").to(torch.bfloat16)
    with torch.inference_mode():
        expected = vae.decode(decoder_input("sdxl", vae, z).bfloat16()).sample
    assert torch.equal(to_torch(run(engine, z, Output.PT).tensor), expected)


@pytest.mark.parametrize("saved", [torch.float32, torch.float16, torch.bfloat16])
def test_auto_on_a_cpu_is_float32_whatever_the_weights_were_saved_in(tmp_path: Path, saved: torch.dtype) -> None:
    vae = tiny_vae("sd").to(saved)
    vae.save_pretrained(tmp_path)
    engine = diffusers_engine(tmp_path)
    z, _ = samples_of("sd")["images"]
    assert engine.dtype == torch.float32
    assert torch.equal(to_torch(run(engine, z, Output.PT).tensor), local_pixels("sd", vae.float(), z))


def test_a_result_says_who_made_it_and_how_long_each_stage_took(folders: Path) -> None:
    engine = diffusers_engine(folders / "sd", dtype="bfloat16", revision="abc")
    result = run(engine, latents(1, 4, 2, 2), Output.PT)
    assert (result.provenance.model, result.provenance.revision, result.provenance.dtype) == (
        "model",
        "abc",
        "bfloat16",
    )
    assert [stage for stage, _ in result.provenance.timings] == ["queue", "decode", "encode"]
    assert all(0 <= ms < 60_000 for _, ms in result.provenance.timings)


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_encode_is_diffusers_encode_and_the_way_back_is_its_round_trip(folders: Path, kind: str) -> None:
    engine = diffusers_engine(folders / kind)
    vae = tiny_vae(kind)
    pixels = latents(2, 3, 32, 48).clamp(-1, 1)
    with torch.inference_mode():
        encoded = vae.encode(pixels)
        expected = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        round_trip = vae.decode(expected).sample
    ours = engine.encode(pixels, SampleMode.ARGMAX).latents
    assert torch.equal(ours, expected)
    assert torch.equal(engine.decode(ours).pixels, round_trip)
    normalised = engine.space.family.scaling.normalize(expected.clone(), engine.space)
    back = to_torch(run(engine, normalised, Output.PT).tensor)
    torch.testing.assert_close(back, round_trip, rtol=0, atol=1e-3)


def test_encode_with_a_generator_is_diffusers_sample_of_the_same_seed(folders: Path) -> None:
    engine = diffusers_engine(folders / "sd")
    pixels = latents(1, 3, 32, 32).clamp(-1, 1)

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(7)

    with torch.inference_mode():
        expected = tiny_vae("sd").encode(pixels).latent_dist.sample(seeded())
    assert torch.equal(engine.encode(pixels, SampleMode.SAMPLE, seeded()).latents, expected)
    assert not torch.equal(engine.encode(pixels, SampleMode.ARGMAX).latents, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_latents_with_a_number_that_is_none_are_refused(folders: Path, bad: float) -> None:
    z = latents(1, 4, 8, 8)
    z[0, 2, 3, 4] = bad
    with pytest.raises(BadRequest, match="NaN or infinity"):
        run(diffusers_engine(folders / "sd"), z, Output.PT)


def test_bytes_in_the_memory_of_another_process_are_decoded(folders: Path) -> None:
    z, _ = samples_of("sd")["images"]
    raw = from_array(z.clone())
    raw.data.flags.writeable = False
    engine = diffusers_engine(folders / "sd")
    pipeline = pipeline_of(engine)
    locked = DecodeRequest(RawTensor(raw.data, raw.dtype, raw.shape), OWN, Output.PT)
    result = asyncio.run(pipeline.decode(locked))
    pipeline.close()
    assert torch.equal(to_torch(result.tensor), local_pixels("sd", tiny_vae("sd"), z))


def no_folder(folder: Path) -> None:
    folder.rmdir()


def empty_folder(folder: Path) -> None:
    pass


def no_weights(folder: Path) -> None:
    save_tiny_vae("sd", folder)
    (folder / WEIGHTS).unlink()


def pickled_weights(folder: Path) -> None:
    """A pickle runs whatever code it holds."""
    tiny_vae("sd").save_pretrained(folder, safe_serialization=False)
    assert [file.name for file in folder.glob("*.bin")]


def truncated_weights(folder: Path) -> None:
    save_tiny_vae("sd", folder)
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def weights_of_another_shape(folder: Path) -> None:
    save_tiny_vae("sd3", folder)
    tiny_vae("sd").save_config(folder)


def weights_with_a_hole(folder: Path) -> None:
    """diffusers fills it with random numbers and only warns; pictures would be wrong and nobody would know."""
    save_tiny_vae("sd", folder)
    weights = load_file(folder / WEIGHTS)
    del weights["decoder.conv_in.weight"]
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def broken_config(folder: Path) -> None:
    save_tiny_vae("sd", folder)
    (folder / "config.json").write_text("{")


def no_autoencoder(folder: Path) -> None:
    UNet2DModel(
        block_out_channels=(8, 8), norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ).save_pretrained(folder)  # fmt: skip


def class_of_tomorrow(folder: Path) -> None:
    save_tiny_vae("sd", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderOfTomorrow"}))


def no_latent_channels(folder: Path) -> None:
    """An autoencoder of sound: there is a `decode`, and nothing in its config that we could go by."""
    save_tiny_vae("sd", folder)
    (folder / "config.json").write_text(json.dumps({"_class_name": AutoencoderOobleck.__name__}))


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (no_folder, "no folder|not exist|not found|no such"),
        (empty_folder, "config.json"),
        (no_weights, "safetensors"),
        (pickled_weights, "safetensors"),
        (truncated_weights, ""),
        (weights_of_another_shape, ""),
        (weights_with_a_hole, "decoder.conv_in.weight"),
        (broken_config, "config.json"),
        (no_autoencoder, "UNet2DModel.*no autoencoder"),
        (class_of_tomorrow, "AutoencoderOfTomorrow"),
        (no_latent_channels, "AutoencoderOobleck|latent_channels"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_model_that_cannot_be_loaded_fails_with_its_reason(
    tmp_path: Path, break_it: Callable[[Path], None], reason: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    break_it(folder)
    with pytest.raises(ModelFailed, match=f"(?is){reason}") as caught:
        diffusers_engine(folder)
    assert str(folder) in caught.value.message
    assert len(caught.value.message) < 1000


def test_a_subfolder_is_where_the_model_is_looked_for(tmp_path: Path) -> None:
    save_tiny_vae("sd", tmp_path / "vae")
    assert diffusers_engine(tmp_path, subfolder="vae").space.channels == 4
    with pytest.raises(ModelFailed):
        diffusers_engine(tmp_path, subfolder="unet")


@pytest.mark.parametrize(
    ("shape", "output", "instead"),
    [((1, 4, 1, 8200), Output.JPEG, "png"), ((1, 4, 1, 1, 2100), Output.MP4, "output_type=pt")],
)
def test_a_picture_too_large_for_its_format_is_refused_before_it_is_decoded(
    shape: tuple[int, ...], output: Output, instead: str
) -> None:
    engine = fake_engine()
    request = DecodeRequest(from_array(torch.zeros(shape)), Scaling(), output)
    with pytest.raises(BadRequest, match=instead):
        engine.processor.unpack_latents(request)
