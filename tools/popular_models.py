"""The models that people ask for, in the order in which they ask: what to serve, and what a decode has to be told.

What has to be told is not written here: it is that of the case in tests/families which holds the model against its pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from families.through_engine import CASES, config_of, hints_of

CONFIG = Path(__file__).resolve().parents[1] / "serve_config.yaml"


@dataclass(frozen=True)
class PopularModel:
    """One row.

    Attributes:
        title: for people.
        source, subfolder: of its VAE on the Hub.
        latents: as its pipeline hands them out with `output_type="latent"`.
        case: how the name of the case in tests/families begins that stands for it.
    """

    title: str
    source: str
    subfolder: str
    latents: str
    case: str

    def cells(self, shipped: Mapping[tuple[str, str], str]) -> Iterator[str]:
        """The row: title, weights, latents, what to say, what comes.

        Args:
            shipped: names of the applications in serve_config.yaml by source and subfolder.
        """
        case = next(case for case in CASES if case.name.startswith(self.case))
        name = shipped.get((self.source, self.subfolder))
        yield self.title + (f" (`{name}`)" if name else "")
        yield f"`{self.source}`" + (f", `{self.subfolder}`" if self.subfolder else "")
        yield self.latents
        sizes = [f"`{size}`" for size in ("height", "width") if size in case.parameters]
        hints = [f"`{_argument(hint, value)}`" for hint, value in hints_of(case).to_plain().items()]
        config = [f"in the application `config: {{{key}: {value:g}}}`" for key, value in config_of(case).items()]
        yield ", ".join(sizes + hints + config) or "nothing"
        yield {"image": "a picture", "video": "a video"}[case.media]


def _argument(hint: str, value: bool | int | float | str) -> str:
    """A flag or a word as it is given; of a number the name alone, since it is the pipeline's own."""
    if isinstance(value, str):
        return f'{hint}="{value}"'
    return f"{hint}={value}" if isinstance(value, bool) else hint


def shipped() -> dict[tuple[str, str], str]:
    """Names of the applications in serve_config.yaml by source and subfolder."""
    applications = yaml.safe_load(CONFIG.read_text())["applications"]
    arguments = {one["name"]: one["args"] for one in applications}
    return {(args["source"], args.get("subfolder", "")): name for name, args in arguments.items() if "source" in args}


_KL, _QWEN, _FLUX2, _WAN = "AutoencoderKL", "AutoencoderKLQwenImage", "AutoencoderKLFlux2", "AutoencoderKLWan"
_LTX, _HUNYUAN = "AutoencoderKLLTXVideo", "AutoencoderKLHunyuanVideo"
POPULAR = (
    PopularModel("Stable Diffusion 1.x, 2.x; LCM, PixArt-alpha", "stabilityai/sd-vae-ft-mse", "", "[B, 4, h, w]",
                 f"{_KL}: Stable Diffusion"),
    PopularModel("SDXL, its Turbo and Lightning, Kolors", "madebyollin/sdxl-vae-fp16-fix", "", "[B, 4, h, w]",
                 f"{_KL}: SDXL"),
    PopularModel("Stable Diffusion 3 and 3.5", "stabilityai/stable-diffusion-3.5-large", "vae", "[B, 16, h, w]",
                 f"{_KL}: Stable Diffusion 3"),
    PopularModel("Flux.1 dev, schnell, Kontext, Fill; Chroma", "black-forest-labs/FLUX.1-schnell", "vae",
                 "packed [B, N, 64]", f"{_KL}: Flux, packed"),
    PopularModel("Flux.2 dev", "black-forest-labs/FLUX.2-dev", "vae", "packed [B, N, 128]",
                 f"{_FLUX2}: Flux.2 dev"),
    PopularModel("Flux.2 Klein", "black-forest-labs/FLUX.2-klein-4B", "vae", "[B, 32, h, w]",
                 f"{_FLUX2}: Flux.2 Klein"),
    PopularModel("Qwen-Image and Qwen-Image-Edit", "Qwen/Qwen-Image", "vae", "packed [B, N, 64]", f"{_QWEN}: packed"),
    PopularModel("Z-Image, HiDream, Lumina 2", "Tongyi-MAI/Z-Image-Turbo", "vae", "[B, 16, h, w]",
                 f"{_KL}: Stable Diffusion 3"),
    PopularModel("Sana", "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers", "vae", "[B, 32, h, w]",
                 "AutoencoderDC"),
    PopularModel("HunyuanImage 2.1", "hunyuanvideo-community/HunyuanImage-2.1-Diffusers", "vae", "[B, 64, h, w]",
                 "AutoencoderKLHunyuanImage"),
    PopularModel("Kandinsky 5, images", "kandinskylab/Kandinsky-5.0-T2I-Lite-sft-Diffusers", "vae",
                 "[B, 1, h, w, 16]", f"{_KL}: Kandinsky 5"),
    PopularModel("a small, quick decoder for SD 1.x (TAESD)", "madebyollin/taesd", "", "[B, 4, h, w]",
                 "AutoencoderTiny: Stable Diffusion"),
    PopularModel("Wan 2.1; Wan 2.2 14B", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "vae", "[B, 16, T, h, w]", _WAN),
    PopularModel("Wan 2.2 5B", "Wan-AI/Wan2.2-TI2V-5B-Diffusers", "vae", "[B, 48, T, h, w]", f"{_WAN}: 2.2 5B"),
    PopularModel("Wan VACE, with reference images", "Wan-AI/Wan2.1-VACE-1.3B-diffusers", "vae", "[B, 16, T, h, w]",
                 f"{_WAN}: VACE"),
    PopularModel("HunyuanVideo", "hunyuanvideo-community/HunyuanVideo", "vae", "[B, 16, T, h, w]", _HUNYUAN),
    PopularModel("HunyuanVideo 1.5", "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v", "vae",
                 "[B, 32, T, h, w]", f"{_HUNYUAN}15"),
    PopularModel("LTX Video 0.9.0", "Lightricks/LTX-Video", "vae", "packed [B, N, 128]", f"{_LTX}: 0.9.0"),
    PopularModel("LTX Video 0.9.1 and later", "Lightricks/LTX-Video-0.9.7-dev", "vae",
                 "packed [B, N, 128]; [B, 128, T, h, w] of LTXConditionPipeline, without sizes", f"{_LTX}: 0.9.5"),
    PopularModel("LTX-2", "Lightricks/LTX-2", "vae", "[B, 128, T, h, w]", "AutoencoderKLLTX2Video"),
    PopularModel("CogVideoX", "THUDM/CogVideoX-2b", "vae", "[B, T, 16, h, w]", "AutoencoderKLCogVideoX"),
    PopularModel("Mochi 1", "genmo/mochi-1-preview", "vae", "[B, 12, T, h, w]", "AutoencoderKLMochi"),
    PopularModel("Stable Video Diffusion", "stabilityai/stable-video-diffusion-img2vid-xt", "vae",
                 "[B, T, 4, h, w]", "AutoencoderKLTemporalDecoder"),
    PopularModel("AnimateDiff", "stabilityai/sd-vae-ft-mse", "", "[B, 4, T, h, w]",
                 f"{_KL}: AnimateDiff"),
)  # fmt: skip
