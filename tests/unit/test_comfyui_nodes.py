"""The ComfyUI nodes, loaded as ComfyUI loads them and driven as its own nodes drive a VAE, against a real server over real HTTP;
what comes back is compared with the local VAE bit for bit. ComfyUI itself is not here."""

from __future__ import annotations

import copy
import pickle
import time
from types import ModuleType
from typing import Any, NoReturn

import pytest
import torch

from comfyui_package import (
    COLD,
    KINDS,
    TINY,
    Served,
    Z,
    load,
    local_images,
    local_latents,
    nodes,
    part,
    picture,
    run,
    running,
    server,
)
from limits import stretched
from local_server import free_port
from remote_vae import errors
from remote_vae.protocol.request import Request
from samples import latents

__all__ = ["nodes", "running", "server"]  # fixtures


# What ComfyUI asks of a package of nodes


def test_every_node_has_what_comfyui_reads_from_it(nodes: ModuleType, server: str) -> None:
    assert nodes.NODE_CLASS_MAPPINGS.keys() == nodes.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        inputs = node.INPUT_TYPES()
        assert {"url", "model"} <= inputs["required"].keys()
        assert callable(getattr(node, node.FUNCTION))
        assert node.CATEGORY
        for kind, *options in (inputs["required"] | inputs["optional"]).values():
            assert kind in ("LATENT", "IMAGE", "VAE", "STRING") or options[0]["default"] in kind


def test_the_list_shows_what_the_server_reports(nodes: ModuleType, server: str, running: Served) -> None:
    before = running.models.described
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        required = node.INPUT_TYPES()["required"]
        assert required["model"][0] == [*sorted([*KINDS, COLD]), "(named in the URL)"]
        assert required["url"][1]["default"] == server
    assert running.models.described - before == len(KINDS) + 1, "one question for all three nodes"
    assert running.models.asleep


def test_without_a_server_the_list_stays_usable(
    nodes: ModuleType, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("REMOTE_VAE_URL", f"{nowhere}/")
    node = nodes.NODE_CLASS_MAPPINGS["RemoteVAE_Load"]
    begun = time.monotonic()
    assert node.INPUT_TYPES()["required"]["model"][0] == [f"(no server at {nowhere})", "(named in the URL)"]
    assert time.monotonic() - begun < stretched(2), "ComfyUI's own server stands still meanwhile"
    assert node.VALIDATE_INPUTS(model="a name that was saved with the workflow") is True
    vae = run(nodes, "RemoteVAE_Load", url=f"{server}/sd", model="(named in the URL)")
    assert torch.equal(vae.decode(Z["sd"]), local_images("sd", Z["sd"]))


# Decode and encode


@pytest.mark.parametrize("kind", ["sd", "flux", "hunyuan"])
def test_decode_is_that_of_the_local_vae(nodes: ModuleType, server: str, kind: str) -> None:
    expected = local_images(kind, Z[kind])
    assert torch.equal(load(nodes, server, kind).decode(Z[kind]), expected)
    images = run(nodes, "RemoteVAE_Decode", samples={"samples": Z[kind]}, url=server, model=kind)
    assert torch.equal(images, expected.reshape(-1, *expected.shape[-3:]))
    assert images.dtype == torch.float32


def test_encode_is_that_of_the_local_vae(nodes: ModuleType, server: str) -> None:
    images = picture(2, 32, 48, 3)
    expected = local_latents("sd", images.movedim(-1, 1))
    assert torch.equal(load(nodes, server, "sd").encode(images), expected)
    samples = run(nodes, "RemoteVAE_Encode", pixels=images, url=server, model="sd")
    assert torch.equal(samples["samples"], expected)


def test_frames_are_encoded_as_one_video(nodes: ModuleType, server: str) -> None:
    vae, frames = load(nodes, server, "hunyuan"), picture(9, 32, 48, 3)
    video = frames.movedim(-1, 0)[None]
    assert torch.equal(vae.encode(frames), local_latents("hunyuan", video))
    assert torch.equal(vae.encode(frames[None]), local_latents("hunyuan", video))
    alone = vae.encode(frames[:2], not_video=True)
    assert torch.equal(alone, local_latents("hunyuan", frames[:2].movedim(-1, 1)[:, :, None]))


def test_a_picture_goes_there_and_back(nodes: ModuleType, server: str) -> None:
    samples = run(nodes, "RemoteVAE_Encode", pixels=picture(1, 32, 48, 3), url=server, model="flux")
    assert run(nodes, "RemoteVAE_Decode", samples=samples, url=server, model="flux").shape == (1, 32, 48, 3)


@pytest.mark.parametrize("height", [31, 32, 33, 39])
def test_sizes_that_do_not_fit_are_cropped_around_the_middle(nodes: ModuleType, server: str, height: int) -> None:
    images = picture(1, height, 43, 3)
    top = height % 8 // 2
    cropped = images[:, top : top + height // 8 * 8, 1:41]
    assert torch.equal(load(nodes, server, "sd").encode(images), local_latents("sd", cropped.movedim(-1, 1)))


def test_a_picture_smaller_than_one_latent_is_refused_with_its_size(nodes: ModuleType, server: str) -> None:
    with pytest.raises(errors.BadRequest, match="40 x 5 pixels; this model needs 8 x 8"):
        load(nodes, server, "sd").encode(picture(1, 5, 40, 3))


def test_alpha_is_left_out(nodes: ModuleType, server: str) -> None:
    images = picture(1, 16, 16, 4)
    assert torch.equal(load(nodes, server, "sd").encode(images), local_latents("sd", images[..., :3].movedim(-1, 1)))


def test_frames_for_an_image_model_are_decoded_one_by_one(nodes: ModuleType, server: str) -> None:
    vae, z = load(nodes, server, "sd"), latents(1, 4, 3, 4, 4)
    video = torch.stack([local_images("sd", frame)[0] for frame in z.movedim(2, 0)])
    torch.testing.assert_close(vae.decode(z)[0], video, atol=2e-5, rtol=0)  # of a batch of three: other last bits
    assert torch.equal(vae.decode(z[:, :, :1]), local_images("sd", z[:, :, 0])), "as comfy.sd.VAE does with one frame"


def test_a_video_with_its_sound_gives_the_video(nodes: ModuleType, server: str) -> None:
    class Nested:  # comfy.nested_tensor.NestedTensor
        is_nested = True

        def unbind(self) -> list[torch.Tensor]:
            return [Z["hunyuan"], latents(1, 8, 10)]

    images = run(nodes, "RemoteVAE_Decode", samples={"samples": Nested()}, url=server, model="hunyuan")
    assert torch.equal(images, local_images("hunyuan", Z["hunyuan"])[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_latents_of_every_dtype_are_taken(nodes: ModuleType, server: str, dtype: torch.dtype) -> None:
    z = Z["sd"].to(dtype)
    images = load(nodes, server, "sd").decode(z)
    assert torch.equal(images, local_images("sd", z.float()))


# Latents that are not ready for the decoder


def test_a_tiny_vae_gets_latents_as_the_diffusion_model_has_them(nodes: ModuleType, server: str) -> None:
    vae, images = load(nodes, server, "tiny"), picture(1, 16, 24, 3)
    assert torch.equal(vae.decode(Z["sd"]), local_images("tiny", Z["sd"] * 0.18215))
    assert torch.equal(vae.encode(images), local_latents("tiny", images.movedim(-1, 1)) / 0.18215)
    torch.testing.assert_close(vae.decode(vae.encode(images)), local_images("tiny", vae.encode(images) * 0.18215))


def test_a_tiny_vae_without_a_family_is_refused_before_its_colours_are_wrong(nodes: ModuleType, server: str) -> None:
    with pytest.raises(errors.BadRequest, match=r"tiny is a tiny VAE.*latents"):
        run(nodes, "RemoteVAE_Load", url=server, model="tiny")
    with pytest.raises(errors.BadRequest, match="sd is no tiny VAE"):
        run(nodes, "RemoteVAE_Decode", samples={"samples": Z["sd"]}, url=server, model="sd", latents=TINY)


def test_normalised_latents_are_scaled_by_the_server(nodes: ModuleType, server: str) -> None:
    vae, images = load(nodes, server, "sd", latents="normalised (LTX-Video)"), picture(1, 16, 16, 3)
    assert torch.equal(vae.decode(Z["sd"]), local_images("sd", Z["sd"] / 0.18215))
    assert torch.equal(vae.encode(images), local_latents("sd", images.movedim(-1, 1)) * 0.18215)


# The VAE in other people's nodes, called as they call it


def test_the_tiled_nodes_get_the_whole_without_seams(nodes: ModuleType, server: str) -> None:
    for kind in ("sd", "hunyuan"):
        vae = load(nodes, server, kind)
        ratio, time_ratio = vae.spacial_compression_decode(), vae.temporal_compression_decode()
        tiles = {"tile_x": 512 // ratio, "tile_y": 512 // ratio, "overlap": 64 // ratio}
        frames = {"tile_t": None, "overlap_t": None} if time_ratio is None else {"tile_t": 16, "overlap_t": 2}
        assert torch.equal(vae.decode_tiled(Z[kind], **tiles, **frames), local_images(kind, Z[kind]))
    images = picture(9, 32, 32, 3)
    sizes = {"tile_x": 512, "tile_y": 512, "overlap": 64}
    assert torch.equal(
        load(nodes, server, "sd").encode_tiled(images, **sizes), load(nodes, server, "sd").encode(images)
    )
    video = vae.encode_tiled(images, **sizes, tile_t=64, overlap_t=8)
    assert torch.equal(video, local_latents("hunyuan", images.movedim(-1, 0)[None]))


@pytest.mark.parametrize("kind", ["sd", "hunyuan"])
def test_its_sizes_are_those_of_the_model(nodes: ModuleType, server: str, kind: str) -> None:
    vae, image = load(nodes, server, kind), kind == "sd"
    assert (vae.spacial_compression_decode(), vae.spacial_compression_encode()) == (8, 8)
    assert vae.temporal_compression_decode() == (None if image else 4)
    assert (vae.latent_dim, vae.latent_channels, vae.output_channels) == (2 if image else 3, 4, 3)
    assert vae.upscale_index_formula == vae.downscale_index_formula == (None if image else (4, 8, 8))
    if image:
        assert vae.upscale_ratio == vae.downscale_ratio == 8
    else:
        assert [vae.upscale_ratio[0](frames) for frames in (0, 1, 3)] == [0, 1, 9]
        assert [vae.downscale_ratio[0](frames) for frames in (0, 1, 9, 10)] == [0, 1, 3, 3]


def test_inpainting_encodes_what_its_node_prepared(nodes: ModuleType, server: str) -> None:
    """As VAEEncodeForInpaint: crop by the ratio, grey out the mask, encode."""
    vae, pixels, mask = load(nodes, server, "sd"), picture(1, 36, 40, 3), torch.zeros(1, 36, 40)
    mask[:, 10:20, 10:20] = 1
    ratio = vae.spacial_compression_encode()
    kept = pixels.shape[1] // ratio * ratio
    pixels = pixels[:, 2 : 2 + kept].clone()
    grey = (1 - mask[:, 2 : 2 + kept])[..., None]
    pixels = (pixels - 0.5) * grey + 0.5
    assert torch.equal(vae.encode(pixels), local_latents("sd", pixels.movedim(-1, 1)))


def test_nodes_that_go_past_the_vae_find_a_model_there(nodes: ModuleType, server: str) -> None:
    vae, images = load(nodes, server, "sd"), picture(1, 16, 16, 3)
    model = vae.first_stage_model
    assert torch.equal(vae.process_output(model.decode(Z["sd"])).movedim(1, -1), vae.decode(Z["sd"]))
    assert torch.equal(model.encode(vae.process_input(images.movedim(-1, 1))), vae.encode(images))
    assert next(model.parameters()).device == vae.device
    vae.throw_exception_if_invalid()
    assert not vae.is_dynamic()
    assert 10**9 // vae.memory_used_decode(Z["sd"].shape, vae.vae_dtype) > 0


def test_what_needs_the_weights_is_told_where_they_are(nodes: ModuleType, server: str) -> None:
    vae = load(nodes, server, "sd")
    assert not hasattr(vae, "patcher")
    with pytest.raises(AttributeError, match="no 'patcher': its weights are on the server"):
        _ = vae.patcher
    with pytest.raises(RuntimeError, match="nothing here to save"):
        vae.get_sd()


def test_a_vae_can_be_copied_and_carries_no_token(
    nodes: ModuleType, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REMOTE_VAE_TOKEN", "s3cret-of-mine")
    vae = load(nodes, server, "hunyuan")
    copied, pickled = copy.deepcopy(vae), pickle.dumps(vae)
    assert torch.equal(copied.decode(Z["hunyuan"]), vae.decode(Z["hunyuan"]))
    assert torch.equal(pickle.loads(pickled).decode(Z["hunyuan"]), vae.decode(Z["hunyuan"]))
    assert b"s3cret" not in pickled


# A cold model, and what goes wrong


def test_loading_leaves_a_cold_model_cold_and_the_first_use_wakes_it(
    nodes: ModuleType, server: str, running: Served
) -> None:
    vae = load(nodes, server, COLD)
    assert running.models.asleep
    assert vae.spacial_compression_decode() == 8
    assert not running.models.asleep
    assert torch.equal(vae.decode(Z["sd"]), local_images("sd", Z["sd"]))


def test_a_model_that_failed_says_why_and_is_tried_again(
    nodes: ModuleType, server: str, running: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running.models, "failing", True)
    with pytest.raises(errors.ModelFailed, match="its weights are not there"):
        load(nodes, server, COLD)
    vae = load(nodes, server, COLD, fallback=LocalVAE())
    assert torch.equal(vae.decode(Z["sd"]), local_images("sd", Z["sd"]))

    class Mends:  # the server's next try succeeds
        async def __call__(self, request: Request) -> NoReturn:
            running.models.failing = False
            raise errors.BadRequest("expected [B, 4, h, w]")

    monkeypatch.setattr(running.models, "_fail", Mends())
    assert load(nodes, server, COLD).spacial_compression_decode() == 8


@pytest.mark.parametrize("node", ["RemoteVAE_Load", "RemoteVAE_Decode", "RemoteVAE_Encode"])
def test_an_unknown_model_is_a_sentence_with_the_names(nodes: ModuleType, server: str, node: str) -> None:
    besides = {
        "RemoteVAE_Load": {}, "RemoteVAE_Decode": {"samples": {"samples": Z["sd"]}},
        "RemoteVAE_Encode": {"pixels": picture(1, 16, 16, 3)},
    }[node]  # fmt: skip
    with pytest.raises(errors.UnknownModel, match=r"'sd-v9'.*flux.*hunyuan.*sd"):
        run(nodes, node, url=server, model="sd-v9", **besides)


def test_no_model_chosen_is_a_sentence_with_the_names(nodes: ModuleType, server: str) -> None:
    with pytest.raises(errors.BadRequest, match=r"No model is chosen.*flux, hunyuan, sd"):
        run(nodes, "RemoteVAE_Load", url=server, model="(named in the URL)")


def test_latents_that_do_not_fit_are_a_sentence_with_the_shapes(nodes: ModuleType, server: str) -> None:
    with pytest.raises(errors.BadRequest, match=r"\[1, 16, 4, 6\].*\[B, 4, h, w\]"):
        load(nodes, server, "sd").decode(Z["flux"])


def test_no_server_shows_at_the_load_node_in_a_sentence(nodes: ModuleType, server: str) -> None:
    with pytest.raises(errors.ConnectionFailed, match="cannot be reached; is the server running"):
        run(nodes, "RemoteVAE_Load", url=f"http://127.0.0.1:{free_port()}", model="sd")


class LocalVAE:
    """As much of a local VAE as a fallback needs."""

    latent_channels, latent_dim, upscale_ratio, downscale_ratio = 4, 2, 8, 8
    downscale_index_formula = None

    def decode(self, samples: torch.Tensor, **_: Any) -> torch.Tensor:
        return local_images("sd", samples)

    def decode_tiled(self, samples: torch.Tensor, **tiles: Any) -> torch.Tensor:
        assert tiles == {"tile_x": 64}
        return local_images("sd", samples)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return local_latents("sd", pixels.movedim(-1, 1))


def test_a_fallback_takes_over_where_there_is_no_server(
    nodes: ModuleType, server: str, caplog: pytest.LogCaptureFixture
) -> None:
    vae = load(nodes, f"http://127.0.0.1:{free_port()}", "sd", fallback=LocalVAE())
    assert torch.equal(vae.decode(Z["sd"]), local_images("sd", Z["sd"]))
    assert "cannot be reached" in caplog.text
    assert torch.equal(vae.decode_tiled(Z["sd"], tile_x=64), local_images("sd", Z["sd"]))
    assert vae.encode(picture(1, 16, 16, 3)).shape == (1, 4, 2, 2)
    assert vae.spacial_compression_encode() == 8


def test_a_fallback_hides_no_mistake_of_the_users(nodes: ModuleType, server: str) -> None:
    with pytest.raises(errors.UnknownModel):
        load(nodes, server, "sd-v9", fallback=LocalVAE())
    with pytest.raises(errors.BadRequest):
        load(nodes, server, "sd", fallback=LocalVAE()).decode(Z["flux"])


# Tokens


@pytest.mark.parametrize(
    ("home", "token", "url", "sent"),
    [
        ("http://gpu:8000", "one", "http://gpu:8000/sd", "one"),
        ("http://gpu", "one", "http://GPU:80/sd", "one"),
        ("http://:one@gpu:8000", None, "http://gpu:8000/sd", "one"),
        ("http://gpu:8000", "one", "http://somebody.else:8000/sd", None),
        ("http://gpu:8000", "one", "http://gpu:8001/sd", None),
        ("https://gpu", "one", "http://gpu/sd", None),
        ("http://gpu:8000", "one", "http://:two@gpu:8000/sd", None),  # it brings its own
        (None, "one", "http://127.0.0.1:8000/sd", "one"),
    ],
)
def test_the_token_goes_to_the_users_own_server_alone(
    nodes: ModuleType, monkeypatch: pytest.MonkeyPatch, home: str | None, token: str | None, url: str, sent: str | None
) -> None:
    for name, value in (("REMOTE_VAE_URL", home), ("REMOTE_VAE_TOKEN", token)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert part(nodes, "address").token_for(url) == sent
    assert "one" not in part(nodes, "address").home(), "the default of a widget is saved with every picture"
