"""`Results`: what was measured, on disk after every measurement, and the machine it was measured on."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import diffusers
import torch

ROOT = Path(__file__).parents[2]
OF_ONE_RUN = ("commit", "date")
"""What may differ between a run and the one that resumes it; all else of the machine may not."""


class Results:
    """Records by key.

    Args:
        path: of the JSON file; None keeps them in memory.
        about: the machine and the settings.

    Attributes:
        about: as given.
        records: key to what was found, or `{"failed": reason}`.
        interrupted: keys of works that time ran out for; they come last in a run that resumes.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        self.path, self.about = path, dict(about)
        self.records: dict[str, dict[str, Any]] = {}
        self.interrupted: list[str] = []

    @classmethod
    def resumed(cls, path: Path, about: Mapping[str, Any]) -> Results:
        """Those in the file, if there is one, to be continued.

        Raises:
            SystemExit: they are of another machine or other settings.
        """
        if not path.exists():
            return cls(path, about)
        old = cls.read(path)
        for key in old.about.keys() | about.keys():
            if key not in OF_ONE_RUN and old.about.get(key) != about.get(key):
                raise SystemExit(
                    f"{path} cannot be resumed: its {key} is {old.about.get(key)!r}, and here it is {about.get(key)!r}. "
                    "Name another file by --out, or leave out --resume."
                )
        if old.about["commit"] != about["commit"]:
            old.about["commit"] = f"{old.about['commit']}, resumed at {about['commit']}"
        return old

    @classmethod
    def read(cls, path: Path) -> Results:
        content = json.loads(path.read_text())
        results = cls(path, content["about"])
        results.records, results.interrupted = content["records"], content["interrupted"]
        return results

    def add(self, key: str, record: dict[str, Any]) -> None:
        self.records[key] = record
        self.interrupted = [other for other in self.interrupted if other != key]
        self.save()

    def interrupt(self, key: str) -> None:
        self.interrupted = [*(other for other in self.interrupted if other != key), key]
        self.save()

    def save(self) -> None:
        """Rewrite the file in one step: whoever is killed meanwhile leaves the old one."""
        if self.path is not None:
            content = {"about": self.about, "records": self.records, "interrupted": self.interrupted}
            write(self.path, json.dumps(content, indent=1) + "\n")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)


def about_machine(device: str, commit: str | None) -> dict[str, Any]:
    """The device, what runs on it, and what of this project is measured."""
    on_card = device == "cuda"
    return {
        "card": torch.cuda.get_device_name() if on_card else f"CPU ({platform.machine()}, {cores()} cores)",
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if on_card else host_memory(),
        "driver": driver() if on_card else None,
        "cuda": torch.version.cuda if on_card else None,
        "cudnn": torch.backends.cudnn.version() if on_card else None,  # type: ignore[no-untyped-call]
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "commit": commit or head(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def driver() -> str:
    """Its version, as nvidia-smi says it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def head() -> str:
    """The commit of this checkout, and whether something beside it was changed; `unknown` outside of a repository."""
    try:
        git = ["git", "-C", str(ROOT)]
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        state = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + (" with changes" if state.stdout.strip() else "")


def slug(card: str) -> str:
    """A file's name for a card: `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def cores() -> int:
    return len(os.sched_getaffinity(0))


def host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
