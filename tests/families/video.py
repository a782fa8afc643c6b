"""All cases of video autoencoders; some of their pipelines make single images."""

from __future__ import annotations

from families import video_frames, video_hunyuan, video_ltx, video_ltx2, video_tokenizers, video_wan
from families.case import Case

CASES: tuple[Case, ...] = (
    *video_wan.CASES,
    *video_ltx.CASES,
    *video_ltx2.CASES,
    *video_hunyuan.CASES,
    *video_frames.CASES,
    *video_tokenizers.CASES,
)
