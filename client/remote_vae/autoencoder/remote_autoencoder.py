"""`RemoteAutoencoder`: a model on a server in place of `pipe.vae`. The pipeline keeps its scaling, its generators and its
post-processing; only `encode` and `decode` go to the server. What a pipeline reads off its VAE is in `local_class`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn, Protocol

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

from remote_vae.autoencoder.decode_arguments import CARRIED, DecodeArguments
from remote_vae.autoencoder.encoder_output import encoder_output, signed_pixels
from remote_vae.autoencoder.local_class import LocalClass
from remote_vae.errors import BadRequest, BrokenReply, ModelFailed
from remote_vae.protocol.model_description import ModelDescription


class Remote(Protocol):
    """What the adapter needs of a `RemoteVAE`."""

    @property
    def decode(self) -> Callable[..., Any]: ...

    def encode(self, image: torch.Tensor, *, sample_mode: Any) -> Any: ...

    def description(self, wake: bool = False) -> ModelDescription: ...


class RemoteAutoencoder(ModelMixin):  # type: ignore[misc]  # diffusers is not typed
    """A remote VAE that is called as the diffusers autoencoder that it is, without weights and without layers.

    A ModelMixin, since `from_pretrained(vae=...)` takes nothing else; and for `isinstance` of the model's own class, by which
    some pipelines tell which VAE they were given. Its one parameter is empty: it carries the device and the dtype that `to`,
    `pipe.to` and the offloading hooks set, and that pipelines read. Statistics that pipelines read off a VAE's buffers are
    buffers here too. The server computes in its own dtype; results come back in the dtype and on the device of what was handed
    in.

    `StableDiffusionImg2ImgPipeline.from_pipe(pipe)` drops a component of a class that it does not know; name it:
    `from_pipe(pipe, vae=pipe.vae)`. `AutoPipelineForImage2Image.from_pipe(pipe)` keeps it. A copy shares the connections.

    Args:
        remote: the model, a `RemoteVAE`. Blocking: nothing else happens in this thread while the server works. It is asked now
            what it is, and a model that sleeps is woken.
        description: what it is, where that is known.

    Raises:
        BadRequest: the installed diffusers does not have its class.
        ModelFailed, BrokenReply: it could not be loaded; its server is too old to say what it is.
        RemoteVAEError: see `errors`.
    """

    _local: LocalClass

    def __init__(self, remote: Remote, description: ModelDescription | None = None) -> None:
        super(RemoteAutoencoder, self).__init__()  # noqa: UP008  # `__class__` below is not what `super()` looks for
        description = description or _loaded(remote.description(wake=True))
        assert description.class_name is not None
        assert description.config is not None
        local = LocalClass(description.class_name, description.config, description.buffers or {})
        self.__dict__.update(_remote=remote, _description=description)
        self.__dict__["_config"] = local.config
        # SDXL's pipelines ask its parameters for the dtype that latents are to have.
        self.post_quant_conv = torch.nn.Module()
        self.post_quant_conv.register_parameter("nothing", torch.nn.Parameter(torch.empty(0), requires_grad=False))
        for name, buffer in local.buffers.items():
            self.register_buffer(name, buffer, persistent=False)
        for name, layer in local.layers.items():
            if name != "post_quant_conv" and next(layer.parameters(), None) is None:
                self.add_module(name, layer)
        self.__dict__["_local"] = local  # now: `__getattr__` looks there
        self.forward = _forward_like(local)  # an attribute, which accelerate's hooks replace

    @property  # type: ignore[misc]  # to be read, as unittest.mock's is
    def __class__(self) -> Any:
        """The model's own class, for `isinstance`."""
        local = self.__dict__.get("_local")
        return RemoteAutoencoder if local is None else local.type

    @property
    def config(self) -> FrozenDict:
        """The VAE's whole config."""
        return self._config

    def register_to_config(self, **values: Any) -> None:
        """Change the config here, as the upscaling pipeline does; the server does not scale, so it need not know."""
        self.__dict__["_config"] = FrozenDict({**self._config, **values})

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels along an edge for each latent."""
        return _known("spatial_ratio", self._description.spatial_ratio)

    @property
    def temporal_compression_ratio(self) -> int:
        """Frames for each latent. AttributeError where it is no video model, as with a local one."""
        return _known("temporal_ratio", self._description.temporal_ratio)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # there is nothing to compile, and much that cannot be traced
    @apply_forward_hook  # type: ignore[untyped-decorator]  # model offloading frees the denoiser's memory here
    def decode(self, *args: Any, **kwargs: Any) -> DecoderOutput | tuple[torch.Tensor] | torch.Tensor:
        """Latents that are ready for the decoder, `[B, C, h, w]` or `[B, C, T, h, w]`, to pixels as the decoder puts them out.

        Args:
            args, kwargs: as the model's own class takes them: the latents, float16, bfloat16 or float32, on any device;
                `return_dict=False` for a tuple; `temb`, `num_frames` and `force_not_quantize` where it has them. A decoder that
                draws noise draws it on the server, by a seed that the `generator` gives.

        Raises:
            BadRequest: an argument that no request carries, by its name.
            RemoteVAEError: see `errors`.
        """
        z, arguments = self._local.arguments("decode", args, kwargs, CARRIED)
        _check(z)
        call = DecodeArguments.of(self._local.type.__name__, z, arguments, "seed" in (self._description.hints or {}))
        made = [
            self._remote.decode(latents, do_scaling=False, output_type="pt", **hints).to(z.device, z.dtype)
            for latents, hints in call.parts()
        ]
        pixels = call.pixels(made)
        if call.return_dict is None:
            return pixels
        return DecoderOutput(sample=pixels) if call.return_dict else (pixels,)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @apply_forward_hook  # type: ignore[untyped-decorator]
    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Pixels in [-1, 1], `[B, 3, H, W]` or `[B, 3, T, H, W]`, to what the model's own class gives for them.

        The distribution's parameters travel, and diffusers' own class samples them here: with the caller's generator the
        sample is the one that a local VAE would give.

        Args:
            args, kwargs: as the model's own class takes them: the pixels, `return_dict=False` for a tuple.

        Returns:
            With `.latent_dist`; with `.latents` or `.latent` for a model that has no distribution.

        Raises:
            BadRequest: the model has no encoder, or an argument that no request carries.
            RemoteVAEError: see `errors`.
        """
        kind = self._description.encode
        if kind is None:
            raise BadRequest(
                "The model on the server has no encoder that it could use; image-to-image pipelines need one: "
                "name another model, or keep a local VAE for this pipeline",
                parameter="image",
            )
        x, arguments = self._local.arguments("encode", args, kwargs, ("return_dict",))
        _check(x)
        mode = "moments" if kind == "moments" else "argmax"
        said = self._description
        signed = signed_pixels(x, said.pixel_scale, said.pixel_shift)
        tensor = self._remote.encode(signed, sample_mode=mode).to(x.device, x.dtype)
        return encoder_output(self._local.type.__name__, kind, tensor, len(x), arguments.get("return_dict", True))

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        """The moments alone: AnyFlow's pipelines call what is private."""
        return self.encode(x).latent_dist.parameters  # type: ignore[no-any-return]

    def enable_tiling(self, *_: Any, **__: Any) -> None:
        """Nothing: how the server spends its memory and its time is its own affair. So are the others."""

    disable_tiling = enable_slicing = disable_slicing = enable_tiling
    fuse_qkv_projections = unfuse_qkv_projections = set_attn_processor = enable_tiling

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        raise BadRequest(
            "A remote VAE has no weights to save; set pipe.vae = None, or back to a local VAE, before you save"
        )

    def __getattr__(self, name: str) -> Any:
        with suppress(AttributeError):
            return super(RemoteAutoencoder, self).__getattr__(name)  # noqa: UP008
        local = self.__dict__.get("_local")
        if local is not None and not name.startswith("_"):
            with suppress(AttributeError):
                return local.layers[name] if name in local.layers else local.plain(name)
        raise AttributeError(
            f"RemoteAutoencoder has no {name!r}: it stands in for a pipeline's VAE and has neither weights nor "
            "layers, nor all that each class of VAE adds. Keep a local VAE for this pipeline"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteAutoencoder:
        restore, parts = self.__reduce__()
        return restore(*parts)

    def __reduce__(self) -> tuple[Callable[..., RemoteAutoencoder], tuple[Any, ...]]:
        return _restored, (self._remote, self._description, dict(self._config), self.dtype, str(self.device))


def _restored(
    remote: Remote, description: ModelDescription, config: dict[str, Any], dtype: torch.dtype, device: str
) -> RemoteAutoencoder:
    """A copy of one, without asking the server again."""
    copied = RemoteAutoencoder(remote, description)
    copied.register_to_config(**config)
    copied.to(device, dtype)
    return copied


def _loaded(description: ModelDescription) -> ModelDescription:
    if description.state == "failed":
        raise ModelFailed(description.reason or "The model could not be loaded; the server's log says why")
    if description.config is None or description.class_name is None:
        raise BrokenReply("The server does not say the model's config; bring it to this client's version of remote-vae")
    return description


def _forward_like(local: LocalClass) -> Callable[..., NoReturn]:
    """Not for a call: some pipelines look at its signature for what `decode` takes."""

    def forward(*_: Any, **__: Any) -> NoReturn:
        raise BadRequest("A remote VAE has no forward pass; call its `encode` and `decode`", parameter="vae")

    forward.__signature__ = local.signature("forward")  # type: ignore[attr-defined]
    return forward


def _known(name: str, ratio: int | None) -> int:
    if ratio is None:
        raise AttributeError(name)  # python now asks `__getattr__` for the property, which says the rest
    return ratio


def _check(tensor: torch.Tensor) -> None:
    """Raises BadRequest for what cannot be sent; for gradients, which would end here in silence."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        what = (
            f"{tensor.layout} tensor on {tensor.device}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        )
        raise BadRequest(f"The remote VAE is given a {what}; expected a dense tensor with values", parameter="tensor")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise BadRequest(
            "No gradients come back from a server; call the remote VAE under torch.no_grad(), or keep a local VAE",
            parameter="tensor",
        )
