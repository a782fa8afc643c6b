"""`LocalClass`: the diffusers autoencoder class that a remote model is of, with an instance of it on torch's meta device, which
has no weights: what pipelines read off a VAE besides its config, and how they may call it."""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict
from torch.nn.modules.module import register_module_module_registration_hook

from remote_vae.errors import BadRequest, BrokenReply

MOST_LAYERS = 10_000
"""Of an autoencoder: several times what the largest has. What a server says of its model is built here."""


class LocalClass:
    """A class of the installed diffusers and an instance without weights.

    Args:
        name: of the class.
        config: of the model.
        buffers: by dotted name, the values of its statistics, such as `bn.running_mean`.

    Raises:
        BadRequest: the installed diffusers has no such class, or the config does not fit it.
        BrokenReply: the buffers do not.
    """

    def __init__(self, name: str, config: Mapping[str, Any], buffers: Mapping[str, Any]) -> None:
        self.type = _class_named(name)
        # An entry of that name would hide a method of the dictionary that diffusers keeps the config in.
        self._said = {key: one for key, one in config.items() if not hasattr(FrozenDict, key)}
        self._model = _without_weights(self.type, self._said)
        self._fill(buffers)

    @property
    def config(self) -> FrozenDict:
        """The config as the server says it, with what the class adds when it is made: AutoencoderTiny counts its blocks, which
        the config.json files of taesd leave out."""
        return FrozenDict({**self._model.config, **self._said})

    def plain(self, name: str) -> Any:
        """An attribute that is a number, a word, or a list of them. Raises AttributeError where there is none."""
        value = getattr(self._model, name)
        if not _is_plain(value):
            raise AttributeError(name)
        return list(value) if isinstance(value, list) else value

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """Statistics of the model's own, in the shapes that its class gives them."""
        return {name: buffer for name, buffer in self._model.named_buffers(recurse=False) if not buffer.is_meta}

    @property
    def layers(self) -> dict[str, torch.nn.Module]:
        """Its layers. Of those that have weights nothing is there but their dtype, which may be cast; a call is refused. One
        without weights is there where the server has told what is in it."""
        return {name: layer for name, layer in self._model.named_children() if not _is_empty(layer)}

    def arguments(
        self, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], carried: Collection[str]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """What is handed to `decode` or `encode`: the tensor, which each class calls otherwise, and the rest by the names of the
        class, its defaults filled in.

        Args:
            carried: names that mean something here.

        Raises:
            TypeError: as the local method would.
            BadRequest: naming an argument that is not its default, and goes with no request.
        """
        bound = self.signature(method).bind(*args, **kwargs)
        bound.apply_defaults()
        (_, tensor), *others = bound.arguments.items()
        for name, value in others:
            if name not in carried and value is not bound.signature.parameters[name].default:
                raise BadRequest(
                    f"{name} of {self.type.__name__}.{method} goes with no request to a server; keep a local VAE for this "
                    "pipeline",
                    parameter=name,
                )
        return tensor, dict(others)

    def signature(self, method: str) -> inspect.Signature:
        """Of a method, without `self`. Raises AttributeError where it has none."""
        whole = inspect.signature(getattr(self.type, method))
        return whole.replace(parameters=list(whole.parameters.values())[1:])

    def _fill(self, buffers: Mapping[str, Any]) -> None:
        own = dict(self._model.named_buffers())
        for name in buffers.keys() & own.keys():  # another version of the class may have others
            path, _, leaf = name.rpartition(".")
            values = torch.tensor([float(value) for value in buffers[name]])
            if values.numel() != own[name].numel():
                raise BrokenReply(
                    f"The server says that {name} of its model has {values.numel()} values; {self.type.__name__} has "
                    f"{own[name].numel()}"
                )
            self._model.get_submodule(path).register_buffer(leaf, values.reshape(own[name].shape))
        for layer in self._model.children():  # what only counts, and is no statistic
            for leaf, buffer in layer.named_buffers(recurse=False):
                if buffer.is_meta and not buffer.is_floating_point():
                    layer.register_buffer(leaf, torch.zeros_like(buffer, device="cpu"))


def _is_empty(layer: torch.nn.Module) -> bool:
    """Whether it has statistics and no weights, and its server is too old to tell them: zeros would be wrong pixels."""
    return next(layer.parameters(), None) is None and any(buffer.is_meta for buffer in layer.buffers())


def _class_named(name: str) -> Any:
    try:
        found = getattr(diffusers, name, None)
    except Exception:  # of what needs a package that is not here, whatever its import raises
        found = None
    if isinstance(found, type) and issubclass(found, diffusers.ModelMixin) and hasattr(found, "decode"):
        return found
    raise BadRequest(
        f"The model on the server is a {name[:80]}, which diffusers {diffusers.__version__} here has not; install the diffusers "
        "that your pipeline needs",
        parameter="vae",
    )


@contextmanager
def _bounded() -> Iterator[None]:
    """Raises ValueError where this thread puts together more layers than any autoencoder has."""
    thread, numbers = threading.get_ident(), itertools.count(1)

    def count(*_: Any) -> None:
        if threading.get_ident() == thread and next(numbers) > MOST_LAYERS:
            raise ValueError(f"it has more than {MOST_LAYERS} layers")

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _without_weights(model_class: Any, config: Mapping[str, Any]) -> Any:
    """An instance on the meta device; its layers refuse to be called."""
    try:
        with _bounded():
            try:
                with torch.device("meta"):
                    model = model_class.from_config(dict(config))
            except RuntimeError as error:
                if "meta tensor" not in str(error):  # of a constructor that reads a tensor's value (VidTok's quantiser)
                    raise
                model = model_class.from_config(dict(config))
    except Exception as error:
        raise BadRequest(
            f"The model's config does not fit {model_class.__name__} of diffusers {diffusers.__version__} here "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]}); bring it to the server's version",
            parameter="vae",
        ) from error
    # Not diffusers' own `to`, which warns. A tensor that `torch.Tensor(...)` makes does not hear of the device above.
    torch.nn.Module.to(model, "meta").eval().requires_grad_(False)
    for layer in model.modules():
        layer.forward = _refuse
    return model


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise BadRequest(
        "A remote VAE has no layers that could be called, only `encode` and `decode`; keep a local VAE for what needs them",
        parameter="vae",
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
