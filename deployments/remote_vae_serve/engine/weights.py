"""Where a model's weights are: in a folder, in the Hub's cache on this node, or on the Hub. What is missing is said.

`from_pretrained` of a Hub id without a network takes half a minute and then complains of a missing config.json. So: the
cache first, which needs no network; else one question to the Hub, answered within seconds or not at all; then one download
of just the files that are needed, safetensors and config.json.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import safe_open

from remote_vae.errors import ModelFailed
from remote_vae_serve.config import VAEConfig

DEMO = Path(__file__).parents[1] / "demo"
PROBE_S = 4.0
STEM = "diffusion_pytorch_model"
TOKEN_HINT = (
    "HF_TOKEN must be in the environment of the Ray nodes (from a secret), not in the configuration, "
    "and its owner must have access"
)


@dataclass(frozen=True)
class Weights:
    """Weights on this node.

    Attributes:
        folder: holds config.json and the safetensors.
        revision: what identifies them: the Hub's commit, `bundled`, or "" for a folder of one's own.
    """

    folder: Path
    revision: str

    def config(self) -> dict[str, Any]:
        """The model's config.json. Raises ModelFailed if it is none."""
        try:
            config = json.loads((self.folder / "config.json").read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise ModelFailed(f"{self.folder / 'config.json'} cannot be read: {_first_line(error)}") from error
        if not isinstance(config, dict):
            raise ModelFailed(f"{self.folder / 'config.json'} is no configuration of a model")
        return config

    def integers(self, config: VAEConfig) -> dict[str, str]:
        """The tensors of the model's safetensors that are stored as integers: dtypes by name. Quantized weights, and counters.

        Other variants may lie beside them, which are none of the model's business.
        """
        found: dict[str, str] = {}
        beside = [path.name for path in self.folder.iterdir()]
        for name in needed_files(config, beside, str(self.folder)):
            if not name.endswith(".safetensors"):
                continue
            with safe_open(self.folder / name, "pt") as file:
                dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118  # no mapping
            found |= {key: dtype for key, dtype in dtypes.items() if dtype[0] in "IUB" and dtype != "BF16"}
        return found


def fetch(config: VAEConfig) -> Weights:
    """The weights of a model, downloaded if need be. Raises ModelFailed with a sentence that says what is missing."""
    return _here(config) or _downloaded(config, lambda files: files)


def config_of(config: VAEConfig) -> dict[str, Any]:
    """A model's config.json, without its weights where they are not here yet. Raises ModelFailed as `fetch` does."""
    return (_here(config) or _downloaded(config, lambda _: ["config.json"])).config()


def _here(config: VAEConfig) -> Weights | None:
    """The weights if they are on this node. Raises ModelFailed where no download would help."""
    if config.source == "demo":
        return Weights(DEMO, "bundled")
    folder = Path(config.source).expanduser()
    if folder.is_dir():
        return _in_folder(config, folder)
    if config.source.startswith((".", "~", "/")) or config.source.count("/") > 1:
        raise ModelFailed(f"The folder {config.source} does not exist on this node")
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", config.source):
        raise ModelFailed(f"source is {config.source!r}; expected a Hub id (owner/name), a local folder or demo")
    return _cached(config)


def _in_folder(config: VAEConfig, folder: Path) -> Weights:
    inside = folder / (config.subfolder or "")
    # Files alone: a pipe of that name would be waited for, for ever.
    names = [path.name for path in inside.iterdir() if path.is_file()] if inside.is_dir() else []
    needed_files(config, names, str(inside))
    return Weights(inside, config.revision or "")


def _cached(config: VAEConfig) -> Weights | None:
    """What an earlier download left on this node, if it is complete. No network is used."""

    def cached(name: str) -> Path | None:
        path = try_to_load_from_cache(config.source, _inside(config) + name, revision=config.revision)
        return Path(path) if isinstance(path, str) else None

    one_file, index = _weight_files(config)
    written, listing = cached("config.json"), cached(index)
    names = json.loads(listing.read_text())["weight_map"].values() if listing else [one_file]
    if written is None or not all(map(cached, names)):
        return None
    depth = len(Path(_inside(config)).parts)
    return Weights(written.parent, written.parents[depth].name)


def _inside(config: VAEConfig) -> str:
    return f"{config.subfolder.strip('/')}/" if config.subfolder else ""


def _weight_files(config: VAEConfig) -> tuple[str, str]:
    """What a model's weights are called: one file, or the index of several."""
    variant = f".{config.variant}" if config.variant else ""
    return f"{STEM}{variant}.safetensors", f"{STEM}.safetensors.index{variant}.json"


def _downloaded(config: VAEConfig, wanted: Callable[[list[str]], list[str]]) -> Weights:
    """What is `wanted` of the files that make the model, from the Hub."""
    names = _ask_hub(config)
    inside = _inside(config)
    here = [name.removeprefix(inside) for name in names if name.startswith(inside)]
    files = needed_files(config, [name for name in here if "/" not in name], config.source)
    try:
        snapshot = Path(
            snapshot_download(
                config.source, revision=config.revision, allow_patterns=[inside + name for name in wanted(files)]
            )
        )
    except Exception as error:
        raise ModelFailed(f"{config.source} could not be downloaded: {download_reason(error)}") from error
    return Weights(snapshot / inside, snapshot.name)


def _ask_hub(config: VAEConfig) -> list[str]:
    """The names of the files the Hub has: one question, a few seconds."""
    source = config.source
    try:
        information = HfApi().model_info(source, revision=config.revision, timeout=PROBE_S)
    except GatedRepoError as error:
        raise ModelFailed(f"{source} is gated: accept its terms on its Hub page; {TOKEN_HINT}") from error
    except RevisionNotFoundError as error:
        raise ModelFailed(f"{source} has no revision {config.revision!r} on the Hub") from error
    except RepositoryNotFoundError as error:
        raise ModelFailed(f"The Hub has no model {source}, or it is private; if it is, {TOKEN_HINT}") from error
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise ModelFailed(f"The Hub refuses access to {source}: is the token right? {TOKEN_HINT}") from error
        raise ModelFailed(f"The Hub answered for {source}: {_first_line(error)}") from error
    except Exception as error:  # the network's many ways to fail
        raise ModelFailed(
            f"{source} is not in this node's cache, and the Hub ({constants.ENDPOINT}) cannot be reached from here "
            f"({type(error).__name__}). Connect the node, fill its cache with `remote-vae-serve fetch`, "
            "or name a local folder as source"
        ) from error
    return [file.rfilename for file in information.siblings or []]


def needed_files(config: VAEConfig, names: Iterable[str], where: str) -> list[str]:
    """Of the files beside each other in `where`, those that make the model: config.json and its safetensors.

    Raises:
        ModelFailed: there is no config.json, or no safetensors of that variant.
    """
    names = sorted(names)
    place = f"{where}, subfolder {config.subfolder}" if config.subfolder else where
    if "config.json" not in names:
        raise ModelFailed(f"{place} has no config.json; does the VAE lie in a `subfolder` such as vae?")
    one_file, index = _weight_files(config)
    if one_file in names:
        return ["config.json", one_file]
    variant = f".{config.variant}" if config.variant else ""
    shards = [name for name in names if re.fullmatch(rf"{STEM}{re.escape(variant)}-\d+-of-\d+\.safetensors", name)]
    if index in names and shards:
        return ["config.json", index, *shards]
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    instead = f"; it has {', '.join(pickles)}, and pickled weights are never loaded" if pickles else ""
    raise ModelFailed(f"{place} has no safetensors named {one_file}{instead}")


def download_reason(error: BaseException) -> str:
    """Why a download failed, in words."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"the disk is full: make room in {constants.HF_HUB_CACHE}, or set HF_HOME to a larger disk"
        if isinstance(seen, OSError) and seen.errno in (errno.EACCES, errno.EROFS):
            return f"{constants.HF_HUB_CACHE} cannot be written to: set HF_HOME to a folder that can"
        seen = seen.__cause__ or seen.__context__
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else "no reason given"
