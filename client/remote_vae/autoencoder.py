"""A model on a server in place of `pipe.vae`: `RemoteVAE.as_autoencoder()`. The pipeline keeps its scaling, its
generators and its post-processing; only `encode` and `decode` go to the server.

The one module of the client that needs torch and diffusers: whoever has a pipeline has both.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NoReturn, Protocol

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

from remote_vae.errors import BadRequest, BrokenReply, ModelFailed
from remote_vae.protocol.model_description import ModelDescription


class Remote(Protocol):
    """What the adapter needs of a `RemoteVAE`."""

    def decode(self, tensor: torch.Tensor, *, do_scaling: bool, output_type: Any) -> Any: ...

    def encode(self, image: torch.Tensor, *, sample_mode: Any) -> Any: ...

    def description(self, wake: bool = False) -> ModelDescription: ...


class RemoteAutoencoder(ModelMixin):  # type: ignore[misc]  # diffusers is not typed
    """A remote VAE with the signatures of a diffusers autoencoder, without weights and without layers.

    A ModelMixin, since `from_pretrained(vae=...)` takes nothing else. Its one parameter is empty: it carries the device and
    the dtype that `to`, `pipe.to` and the offloading hooks set, and that pipelines read. The server computes in its own
    dtype; results come back in the dtype and on the device of what was handed in.

    `StableDiffusionImg2ImgPipeline.from_pipe(pipe)` drops a component of a class that it does not know; name it:
    `from_pipe(pipe, vae=pipe.vae)`. `AutoPipelineForImage2Image.from_pipe(pipe)` keeps it.

    Args:
        remote: the model, a `RemoteVAE`. Blocking: nothing else happens in this thread while the server works.
    """

    def __init__(self, remote: Remote) -> None:
        super().__init__()
        self._remote = remote
        # SDXL's pipelines ask its parameters for the dtype that latents are to have.
        self.post_quant_conv = torch.nn.Module()
        self.post_quant_conv.register_parameter("nothing", torch.nn.Parameter(torch.empty(0), requires_grad=False))

    @cached_property
    def _description(self) -> ModelDescription:
        """Asked for once, and only when a pipeline wants to know; a model that sleeps is woken. Failures are not kept."""
        description = self._remote.description(wake=True)
        if description.state == "failed":
            raise ModelFailed(description.reason or "The model could not be loaded; the server's log says why")
        if description.config is None:
            raise BrokenReply(
                "The server does not say the model's config; bring it to this client's version of remote-vae"
            )
        return description

    @cached_property
    def _config(self) -> FrozenDict:
        description = self._description
        assert description.config is not None
        config = dict(description.config)
        # AutoencoderTiny adds what pipelines count when it is made; config.json files as old as taesd's do not have it.
        if "decoder_block_out_channels" in config:
            config.setdefault("block_out_channels", config["decoder_block_out_channels"])
        return FrozenDict(config)

    @property
    def config(self) -> FrozenDict:
        """The VAE's whole config. Raises RemoteVAEError where the server cannot say it."""
        return self._config

    def register_to_config(self, **values: Any) -> None:
        """Change the config here, as the upscaling pipeline does; the server does not scale, so it need not know."""
        self._config = FrozenDict({**self._config, **values})

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels along an edge for each latent."""
        return _known("spatial_ratio", self._description.spatial_ratio)

    @property
    def temporal_compression_ratio(self) -> int:
        """Frames for each latent. AttributeError where it is no video model, as with a local one."""
        return _known("temporal_ratio", self._description.temporal_ratio)

    @apply_forward_hook  # type: ignore[untyped-decorator]  # model offloading frees the denoiser's memory here
    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Latents that are ready for the decoder, `[B, C, h, w]` or `[B, C, T, h, w]`, to pixels around [-1, 1].

        Args:
            z: float16, bfloat16 or float32, on any device.
            return_dict: False for a tuple.
            generator: not used, as by the decoders it stands in for.

        Raises:
            RemoteVAEError: see `errors`.
        """
        _check_no_gradients(z)
        pixels = self._remote.decode(z, do_scaling=False, output_type="pt").to(z.device, z.dtype)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def encode(
        self, x: torch.Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | AutoencoderTinyOutput | tuple[Any]:
        """Pixels in [-1, 1], `[B, 3, H, W]` or `[B, 3, T, H, W]`, to the distribution of their latents.

        The distribution's parameters travel, and diffusers' own class samples them here: with the caller's generator the
        sample is the one that a local VAE would give.

        Returns:
            With `.latent_dist`; with `.latents` for a model that has no distribution (AutoencoderTiny).

        Raises:
            BadRequest: the model has no encoder.
            RemoteVAEError: see `errors`.
        """
        _check_no_gradients(x)
        kind = self._description.encode
        if kind == "moments":
            moments = self._remote.encode(x, sample_mode="moments").to(x.device, x.dtype)
            distribution = DiagonalGaussianDistribution(moments)
            return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)
        if kind == "latents":
            latents = self._remote.encode(x, sample_mode="argmax").to(x.device, x.dtype)
            return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)
        raise BadRequest(
            "The model on the server has no encoder that it could use; image-to-image pipelines need one: "
            "name another model, or keep a local VAE for this pipeline",
            parameter="image",
        )

    def enable_tiling(self, *_: Any, **__: Any) -> None:
        """Nothing: how the server spends its memory is its own affair. So are the other three."""

    def disable_tiling(self) -> None: ...

    def enable_slicing(self) -> None: ...

    def disable_slicing(self) -> None: ...

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        raise BadRequest(
            "A remote VAE has no weights to save; set pipe.vae = None, or back to a local VAE, before you save"
        )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(
                f"{type(self).__name__} has no {name!r}: it stands in for a pipeline's VAE and has neither weights nor "
                "layers, nor all that each class of VAE adds. Keep a local VAE for this pipeline"
            ) from None


def _known(name: str, ratio: int | None) -> int:
    if ratio is None:
        raise AttributeError(name)  # python now asks `__getattr__` for the property, which says the rest
    return ratio


def _check_no_gradients(tensor: torch.Tensor) -> None:
    """They would end here in silence."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise BadRequest(
            "No gradients come back from a server; call the remote VAE under torch.no_grad(), or keep a local VAE",
            parameter="tensor",
        )
