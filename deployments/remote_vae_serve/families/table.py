"""The table of families, put together of the rows in `images` and `videos`: every autoencoder class of diffusers. A row says
what its own pipelines do; tests/families holds each against them.

Sources: diffusers 0.42.1, the pipelines that tests/families names for each class, and the configurations on the Hub.
"""

from __future__ import annotations

from typing import Any

from remote_vae_serve.families import images, videos
from remote_vae_serve.families.config_readers import ratio_if_known
from remote_vae_serve.families.family import Config, Family, LatentSpace
from remote_vae_serve.families.images import IMAGE_LAYOUTS

FAMILIES: tuple[Family, ...] = (*images.ROWS, *videos.ROWS)
GENERIC = Family("a class without a row: treated as an image VAE", (), IMAGE_LAYOUTS, ratio_if_known)


def latent_space_of(class_name: str, config: Config, model: Any = None) -> LatentSpace:
    """The latent space of a diffusers class and its config; a class without a row gets the generic one.

    Args:
        model: of the class, with or without weights; some rows read their numbers from it.
    """
    family = next((row for row in FAMILIES if class_name in row.classes), GENERIC)
    return family.space(class_name, config, model)
