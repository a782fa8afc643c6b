"""Every pipeline class of the installed diffusers around `as_autoencoder()`: constructed as around the VAE itself, and all that
its code reads off its VAE is there, and the same."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import MagicMock

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline

from families.case import Case
from families.through_engine import ALL
from remote_vae.autoencoder.remote_autoencoder import RemoteAutoencoder
from remote_vae.errors import BadRequest
from remote_vae.protocol.model_description import ModelDescription
from remote_vae_serve.engine.model_config import statistics_of
from remote_vae_serve.families.table import latent_space_of

NAMES = ("vae", "vqvae", "movq")
"""What pipelines call their image or video VAE."""
READ = re.compile(rf"\bself\.(?:{'|'.join(NAMES)})((?:\.\w+)+)")
NOT_CONSTRUCTED = {
    "LEditsPPPipelineStableDiffusion": "fetches a scheduler from the Hub",
    "LEditsPPPipelineStableDiffusionXL": "fetches a scheduler from the Hub",
    "OmniGenPipeline": "needs torchvision",
    "UniDiffuserPipeline": "compares the sizes of its other parts",
}
"""With the VAE itself neither, around nothing else."""
REFUSED = {
    "AmusedImg2ImgPipeline": "quantize",
    "AmusedInpaintPipeline": "quantize",
    "VQDiffusionPipeline": "quantize",
}
"""What no server answers, a layer that is called: a sentence says so when it comes to it."""
CASES: dict[str, Case] = {}
for _case in ALL:
    CASES.setdefault(_case.class_name, _case)
AUDIO = re.compile("Audio|AceStep|MusicLDM|Proteina")


class Described:
    """A model that only says what it is, as its server does."""

    def __init__(self, module: Any) -> None:
        space = latent_space_of(type(module).__name__, module.config, module)
        said = ModelDescription(
            class_name=space.class_name, config=dict(module.config), buffers=statistics_of(module), encode="moments",
            spatial_ratio=space.ratio, temporal_ratio=space.temporal_ratio,
        )  # fmt: skip
        self._plain = json.loads(json.dumps(said.to_plain()))

    def description(self, wake: bool = False) -> ModelDescription:
        return ModelDescription.from_plain(self._plain)


def pipelines() -> dict[str, Any]:
    """By name, those that take a VAE of images or videos."""
    found = {name: getattr(diffusers, name) for name in dir(diffusers) if "Pipeline" in name}
    return {
        name: one
        for name, one in sorted(found.items())
        if isinstance(one, type) and issubclass(one, DiffusionPipeline) and _takes(one) and not AUDIO.search(name)
    }


def _takes(pipeline: Any) -> str | None:
    """The name of the argument."""
    return next((name for name in NAMES if name in inspect.signature(pipeline.__init__).parameters), None)


def _classes(pipeline: Any) -> list[str]:
    """Classes that its VAE may be of, by its annotation."""
    annotation = str(inspect.signature(pipeline.__init__).parameters[str(_takes(pipeline))].annotation)
    return [name for name in CASES if re.search(rf"\b{name}\b", annotation)]


@cache
def _module(class_name: str) -> Any:
    return CASES[class_name].build()


@cache
def _stand_in(class_name: str) -> RemoteAutoencoder:
    return RemoteAutoencoder(Described(_module(class_name)))


@contextmanager
def _config_kept(*vaes: Any) -> Iterator[None]:
    """An upscaling pipeline changes it when it is made."""
    before = [dict(vae.config) for vae in vaes]
    yield
    for vae, config in zip(vaes, before, strict=True):
        vae.register_to_config(**config)


def _built(pipeline: Any, vae: Any) -> Any:
    """Around that VAE alone; where a constructor looks into another part as well, that is anything."""
    name = str(_takes(pipeline))
    parameters = [
        one for one in inspect.signature(pipeline.__init__).parameters.values() if one.kind is one.POSITIONAL_OR_KEYWORD
    ]
    parts = {one.name for one in parameters} - {"self", name}
    empty = {one.name for one in parameters if one.default is one.empty} & parts
    try:
        return pipeline(**{name: vae}, **dict.fromkeys(empty))
    except (AttributeError, ImportError):
        return pipeline(**{name: vae}, **{part: _anything() for part in empty | ({"safety_checker"} & parts)})


def _anything() -> Any:
    part = MagicMock()
    part.__class__ = torch.nn.Module
    return part


def _reads(pipeline: Any) -> Iterator[list[str]]:
    """Chains of attributes that the class and those it is made of read off their VAE."""
    for one in pipeline.__mro__:
        if one.__module__.startswith("diffusers.pipelines"):
            for chain in sorted(set(READ.findall(inspect.getsource(one)))):
                yield chain.strip(".").split(".")


PIPELINES = pipelines()


def shown(names: Iterable[str]) -> list[Any]:
    """Of `pytest.mark.parametrize`: in `make test` one pipeline of each folder of diffusers; `make test-families` has all."""
    folders: set[str] = set()
    parameters = []
    for name in names:
        folder = PIPELINES[name].__module__.rpartition(".")[0]
        parameters.append(pytest.param(name, marks=pytest.mark.families if folder in folders else ()))
        folders.add(folder)
    return parameters


@pytest.fixture(scope="module", autouse=True)
def _silent() -> Iterator[None]:
    """Deprecated pipelines say so, and parts that are missing."""
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    yield
    diffusers.utils.logging.set_verbosity(before)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", shown(name for name in PIPELINES if name not in NOT_CONSTRUCTED))
def test_it_is_constructed_as_around_the_vae(name: str) -> None:
    pipeline = PIPELINES[name]
    assert _classes(pipeline), "a class of VAE that no case has"
    compared = 0
    for class_name in _classes(pipeline):
        local = _module(class_name)
        vae = _stand_in(class_name)
        assert isinstance(vae, type(local))
        with _config_kept(local, vae):
            try:
                expected = _told(_built(pipeline, local))
            except AttributeError:
                continue  # the annotation names a class that the code cannot take
            assert _told(_built(pipeline, vae)) == expected
            compared += 1
    assert compared


def _told(pipe: Any) -> dict[str, Any]:
    """What a constructor made of its VAE."""
    return {name: value for name, value in vars(pipe).items() if isinstance(value, (int, float, str))}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", shown(PIPELINES))
def test_what_its_code_reads_off_the_vae_is_there(name: str) -> None:
    pipeline = PIPELINES[name]
    for class_name in _classes(pipeline):
        local = _module(class_name)
        vae = _stand_in(class_name)
        for chain in _reads(pipeline):
            if REFUSED.get(name) not in chain:
                _check_same(local, vae, chain)


def _check_same(theirs: Any, ours: Any, chain: list[str]) -> None:
    for name in chain:
        if not hasattr(theirs, name):
            return  # of another class of VAE
        theirs, ours = getattr(theirs, name), getattr(ours, name)
        if isinstance(theirs, torch.Tensor):
            assert torch.equal(theirs, ours), chain
        elif isinstance(theirs, (bool, int, float, str, list, tuple)):
            assert list(ours) == list(theirs) if isinstance(theirs, (list, tuple)) else ours == theirs, chain
        else:
            assert callable(ours) == callable(theirs), chain


@pytest.mark.parametrize(("name", "attribute"), REFUSED.items())
def test_what_is_refused_is_refused_with_a_sentence(name: str, attribute: str) -> None:
    (class_name,) = _classes(PIPELINES[name])
    vae = _stand_in(class_name)
    assert any(attribute in chain for chain in _reads(PIPELINES[name]))
    with pytest.raises((BadRequest, AttributeError), match="local VAE"):
        getattr(vae, attribute)(torch.zeros(1))


@pytest.mark.parametrize(
    ("class_name", "name"), [("AutoencoderKLFlux2", "bn"), ("AutoencoderKLLTXVideo", "latents_mean")]
)
def test_statistics_that_an_older_server_does_not_tell_are_missed_and_not_made_up(class_name: str, name: str) -> None:
    described = Described(_module(class_name))
    assert described.description().buffers
    del described._plain["buffers"]
    vae = RemoteAutoencoder(described)
    with pytest.raises(AttributeError, match=rf"has no '{name}'.* Keep a local VAE"):
        getattr(vae, name)
