"""The three nodes."""

from __future__ import annotations

from typing import Any

import torch

from .address import IN_URL, endpoint, home, models
from .latents import CHOICES, READY
from .model import RemoteModel
from .vae import NOT_THE_USERS, ServerVAE

Inputs = dict[str, dict[str, Any]]


class ServerNode:
    """What the three have in common: a server, a model, and what the latents are."""

    CATEGORY = "remote-vae"

    @staticmethod
    def inputs(**besides: Any) -> Inputs:
        names = models()
        return {
            "required": {
                **besides,
                "url": ("STRING", {
                    "default": home(),
                    "tooltip": "Your remote-vae server. The default is REMOTE_VAE_URL of ComfyUI's environment. No token here: "
                    "it would be saved in every picture; set REMOTE_VAE_TOKEN.",
                }),
                "model": (names, {
                    "default": names[0],
                    "tooltip": "The models of the server in REMOTE_VAE_URL; press R to ask it again. For a model of another "
                    f"server choose {IN_URL} and write the model's whole URL above.",
                }),
            },
            "optional": {
                "latents": (list(CHOICES), {
                    "default": READY,
                    "tooltip": "Only for tiny VAEs (TAESD and kin), and for families whose VAE normalises by itself in ComfyUI.",
                }),
            },
        }  # fmt: skip

    @classmethod
    def VALIDATE_INPUTS(cls, model: str) -> bool:
        """That this takes `model` makes ComfyUI accept names that are not in its list: the server may have been down when the
        page was loaded, or the workflow comes from elsewhere. The node asks the server itself."""
        return True


class LoadRemoteVAE(ServerNode):
    """A VAE for every node that wants one."""

    RETURN_TYPES = ("VAE",)
    FUNCTION = "load"
    DESCRIPTION = "A VAE whose weights are on your remote-vae server; for every node that takes a VAE."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        inputs = cls.inputs()
        inputs["optional"]["fallback"] = ("VAE", {"tooltip": "A local VAE, used while the server cannot be."})
        return inputs

    def load(self, url: str, model: str, latents: str = READY, fallback: Any = None) -> tuple[ServerVAE]:
        """Asks the server now, so that a wrong name, or no server, shows before the sampling and not after it. A cold model
        is left cold."""
        remote = RemoteModel(endpoint(url, model), latents)
        try:
            remote.look()
        except NOT_THE_USERS:
            if fallback is None:
                raise
        return (ServerVAE(remote, fallback),)


class DecodeRemotely(ServerNode):
    """`VAE Decode` and its VAE in one node."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "decode"
    DESCRIPTION = "Decodes latents on your remote-vae server."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return cls.inputs(samples=("LATENT", {"tooltip": "Images or a video."}))

    def decode(self, samples: dict[str, Any], url: str, model: str, latents: str = READY) -> tuple[torch.Tensor]:
        """Images `[N, H, W, 3]` in [0, 1]; the frames of videos one after the other."""
        latent = samples["samples"]
        if latent.is_nested:  # a video and its sound: the video comes first
            latent = latent.unbind()[0]
        images = ServerVAE(RemoteModel(endpoint(url, model), latents)).decode(latent)
        return (images.flatten(0, 1) if images.ndim == 5 else images,)


class EncodeRemotely(ServerNode):
    """`VAE Encode` and its VAE in one node."""

    RETURN_TYPES = ("LATENT",)
    FUNCTION = "encode"
    DESCRIPTION = "Encodes images, or the frames of a video, on your remote-vae server."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return cls.inputs(pixels=("IMAGE", {"tooltip": "Images; for a video model, the frames of one video."}))

    def encode(
        self, pixels: torch.Tensor, url: str, model: str, latents: str = READY
    ) -> tuple[dict[str, torch.Tensor]]:
        return ({"samples": ServerVAE(RemoteModel(endpoint(url, model), latents)).encode(pixels)},)


# Keys are one name space for all custom nodes of the world; LoadRemoteVAE and RemoteVAEDecode are taken in it.
NODE_CLASS_MAPPINGS: dict[str, type[ServerNode]] = {
    "RemoteVAE_Load": LoadRemoteVAE,
    "RemoteVAE_Decode": DecodeRemotely,
    "RemoteVAE_Encode": EncodeRemotely,
}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "RemoteVAE_Load": "Load Remote VAE",
    "RemoteVAE_Decode": "VAE Decode (Remote VAE)",
    "RemoteVAE_Encode": "VAE Encode (Remote VAE)",
}
