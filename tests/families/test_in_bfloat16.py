"""What a row says may run in bfloat16 on a CPU stays near enough to float32, and is what `auto` chooses there."""

from __future__ import annotations

import math
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from families.case import Case
from families.in_bfloat16 import NEEDED, psnr, psnr_of
from families.shown import parameters
from families.through_engine import CASES, serving
from remote_vae_serve.engine import diffusers_engine
from remote_vae_serve.families.table import FAMILIES

# LTX-2's diffusion decoder calls it so by itself, on a CPU.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.mark.parametrize("case", parameters(CASES))
def test_what_may_run_in_bfloat16_keeps_45_db(case: Case, tmp_path: Path) -> None:
    """docs/models.md has the worst of each class, tests/unit/test_family_page.py holds that a row says no more than that."""
    (row,) = (family for family in FAMILIES if case.class_name in family.classes)
    kept = psnr_of(case, tmp_path)
    for part in row.bfloat16:
        assert (kept[part] or 0) >= NEEDED, part


@pytest.mark.parametrize("case", parameters(CASES))
def test_auto_is_bfloat16_on_a_fast_cpu_where_the_row_says_so(case: Case, tmp_path: Path) -> None:
    for fast in (True, False):
        with (
            patch.object(diffusers_engine, "is_bfloat16_faster", lambda fast=fast: fast),
            serving(case, tmp_path, dtype="auto") as served,
        ):
            for part, dtype in (("decode", served.engine.dtype), ("encode", served.engine.encode_dtype)):
                both = {"decode", part} <= set(served.engine.space.family.bfloat16)
                assert dtype is (torch.bfloat16 if fast and both else torch.float32)


def test_psnr_is_of_the_range_of_what_is_exact() -> None:
    exact = torch.tensor([0.0, 2.0, 1.0, 1.0])
    assert psnr(exact + 0.02, exact) == pytest.approx(40)
    assert psnr(exact, exact) == math.inf
    assert psnr(exact * torch.nan, exact) == -math.inf
