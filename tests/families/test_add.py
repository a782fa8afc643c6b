"""`remote-vae-serve add` knows every class: what it prints is an application that loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

from families.case import Case
from families.shown import parameters
from families.through_engine import CASES
from remote_vae_serve.cli import main
from remote_vae_serve.config import VAEConfig
from remote_vae_serve.engine.diffusers_engine import DiffusersEngine
from remote_vae_serve.families.table import latent_space_of

ONE_OF_EACH = tuple({case.class_name: case for case in reversed(CASES)}.values())
"""The first of each class."""


@pytest.mark.parametrize("case", parameters(ONE_OF_EACH))
def test_what_add_prints_of_a_folder_loads_and_is_said_to_be_of_its_family(case: Case, tmp_path: Path) -> None:
    module = case.build()
    module.save_pretrained(tmp_path)
    space = latent_space_of(case.class_name, module.config, module)
    printed = CliRunner().invoke(main, ["add", str(tmp_path), "--name", "mine"])
    assert printed.exit_code == 0, printed.output
    assert f"{space.class_name}, {space.channels} latent channels: {space.family.name}; hints: " in printed.stdout
    (application,) = yaml.safe_load("applications:\n" + printed.stdout)["applications"]
    assert application["import_path"] == "remote_vae_serve.app:vae"
    engine = DiffusersEngine(VAEConfig(**application["args"], dtype="float32", threads=1), "cpu")
    engine.load()
    assert type(engine._model(torch.float32)).__name__ == case.class_name
    assert (engine.space.takes, engine.space.ratio) == (space.takes, space.ratio)
