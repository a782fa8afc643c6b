"""The cases of every image autoencoder."""

from __future__ import annotations

from families import images_flux2, images_hunyuan, images_kl, images_others, images_qwen, images_vq
from families.case import Case

CASES: tuple[Case, ...] = (
    *images_kl.CASES,
    *images_others.CASES,
    *images_qwen.CASES,
    *images_flux2.CASES,
    *images_hunyuan.CASES,
    *images_vq.CASES,
)
