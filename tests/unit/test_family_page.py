"""docs/models.md says what the table says, and the table has every class that the installed diffusers has."""

from __future__ import annotations

import json

import pytest
from diffusers.models import autoencoders

from families.in_bfloat16 import NEEDED
from families.through_engine import ALL, CASES, NOT_SERVED, TOLERANCE
from models_page import LATER, MEASURED, PAGE, RATIOS, main
from remote_vae_serve.families.table import FAMILIES

ROWS = {name for family in FAMILIES for name in family.classes}
IN_FLOAT32_ALL_THE_SAME = {("AutoencoderKLWan", "encode"), ("AutoencoderKLCosmos", "encode")}
"""What keeps enough, and whose row says why that is not enough."""


def test_no_autoencoder_of_the_installed_diffusers_is_without_a_row() -> None:
    """A new one needs a row in families/images.py or videos.py and a case in tests/families, or a place among those for later."""
    found = {name for name, value in vars(autoencoders).items() if isinstance(value, type) and hasattr(value, "decode")}
    assert sorted(found - ROWS - set(LATER)) == []
    assert sorted((ROWS | set(LATER)) - found) == []
    assert not ROWS & set(LATER)


def test_every_row_has_a_case_and_a_ratio_on_the_page() -> None:
    assert {case.class_name for case in CASES} == ROWS == set(RATIOS)
    assert len(ROWS) == 29
    assert {case.name for case in ALL} - {case.name for case in CASES} == set(NOT_SERVED)


def test_the_page_of_models_is_what_the_table_makes_of_it() -> None:
    assert main(["--check"]) == 0, "docs/models.md is stale: make models"


def test_a_page_that_is_stale_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(RATIOS, "AutoencoderKL", "9")
    before = PAGE.read_text()
    assert main(["--check"]) == 1
    assert "tools/models_page.py" in capsys.readouterr().err
    assert PAGE.read_text() == before


def test_what_was_measured_is_of_every_case_and_within_what_is_promised() -> None:
    measured = json.loads(MEASURED.read_text())["cases"]
    assert list(measured) == [case.name for case in CASES]
    for case in CASES:
        assert measured[case.name]["decode"] <= TOLERANCE
        assert (measured[case.name]["encode"] is None) == (case.encode is None)
        assert (measured[case.name]["encode"] or 0) <= TOLERANCE


@pytest.mark.parametrize("name", sorted(ROWS))
def test_what_may_run_in_bfloat16_was_measured_to_keep_what_is_needed(name: str) -> None:
    measured = json.loads(MEASURED.read_text())["bfloat16"][name]
    (row,) = (family for family in FAMILIES if name in family.classes)
    for part in ("decode", "encode"):
        numbers = [measured[key] for key in (part, f"{part} at full size") if key in measured]
        keeps = bool(numbers) and min(numbers) >= NEEDED
        assert (part in row.bfloat16) == (keeps and (name, part) not in IN_FLOAT32_ALL_THE_SAME)
