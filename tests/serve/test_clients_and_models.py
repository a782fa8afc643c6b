"""The table "client x model kind" of docs/clients.md: every cell over real HTTP, its pixels compared with the pipeline's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client_cells import BEGIN, CELLS, CLIENTS, DOCS, END, KINDS, PICTURE, REFUSALS, Held, Kind, model, with_table
from in_process import InProcess, diffusers_engine, pipeline_of
from remote_vae_serve.http.app import create_app
from served import served
from wire_answers import as_uint8, assert_jpeg, pixels_of


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of all the models, on a port of its own."""
    pipelines = {name: _pipeline(name, tmp_path_factory.mktemp(name)) for name in {kind.model for kind in KINDS}}
    models = InProcess(**{name: pipeline.answer for name, pipeline in pipelines.items()})
    with served(create_app(models, 1 << 22, 60.0)) as address:
        yield address
    for pipeline in pipelines.values():
        pipeline.close()


def _pipeline(name: str, folder: Path) -> Any:
    model(name).save_pretrained(folder)
    return pipeline_of(diffusers_engine(folder), name)


def check(held: Held, kind: Kind) -> None:
    """What the user holds is what the model's pipeline makes of the same latents."""
    if held.form == "latents":
        check_sample(held.value, kind)
    elif held.form == "pt":
        assert held.value.dtype == torch.float32
        assert torch.equal(held.value, kind.pixels)
    elif held.form == "png":
        np.testing.assert_array_equal(np.asarray(held.value), as_uint8(kind.pixels)[0])
    else:
        assert_jpeg(held.value, as_uint8(kind.pixels)[0])


def check_sample(z: torch.Tensor, kind: Kind) -> None:
    """A sample of the distribution that the model's encoder gives, in the scale asked for; the helper has no seed."""
    pixels = pixels_of(PICTURE)
    factors = kind.factors
    with torch.inference_mode():
        distribution = model(kind.model).encode(pixels[:, :, None] if kind.model == "hunyuan" else pixels).latent_dist
    ready = z / factors["scaling_factor"] + factors.get("shift_factor", 0.0)
    assert ready.shape == distribution.mean.shape
    noise = (ready - distribution.mean) / distribution.std
    assert 0.7 < noise.std() < 1.3
    assert noise.mean().abs() < 0.5


@pytest.mark.parametrize(("client", "kind"), CELLS, ids=[f"{client} x {kind.name}" for client, kind in CELLS])
def test_every_client_gets_the_pipelines_pixels_or_reads_why_not(url: str, client: str, kind: Kind) -> None:
    check_cell(f"{url}/{kind.model}", client, kind)


def check_cell(endpoint: str, client: str, kind: Kind) -> None:
    """One cell of the table."""
    refusal = REFUSALS.get((client, kind.name))
    if refusal is None:
        check(CLIENTS[client](endpoint, kind), kind)
        return
    with pytest.raises((RuntimeError, IndexError)) as caught:
        CLIENTS[client](endpoint, kind)
    assert refusal.says in str(caught.value)


def test_the_models_of_a_column_tell_the_conventions_apart() -> None:
    """Were two of them alike, a server that mixed them up would pass."""
    for kind in KINDS:
        unscaled = model(kind.model).decode(kind.batched).sample if not kind.packed else None
        assert unscaled is None or (unscaled - kind.pixels).abs().mean() > 0.01
    sd, sdxl = KINDS[:2]
    assert not torch.equal(model("sd").decode(sd.z).sample, model("sdxl").decode(sd.z).sample)
    assert sd.factors != sdxl.factors


def test_the_page_on_clients_has_the_table_of_today() -> None:
    """`python tests/client_cells.py` writes it anew."""
    page = DOCS.read_text()
    assert page.count(BEGIN) == page.count(END) == 1
    assert with_table(page) == page
