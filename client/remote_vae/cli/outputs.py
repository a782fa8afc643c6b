"""Where the results of the command line go: `Outputs`, from `-o`, `--format` and the names of the inputs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from remote_vae.cli.files import STDIO

_SAME = {"jpeg": "jpg"}


@dataclass(frozen=True)
class Outputs:
    """Which files an input becomes.

    Attributes:
        folder: where they go, under the names of their inputs; None for beside their inputs.
        file: the one name for the one input; `-` for standard output.
        kind: a format, None where it is what fits the input.
    """

    folder: Path | None = None
    file: Path | None = None
    kind: str | None = None

    @classmethod
    def of(cls, target: str | None, kind: str | None, kinds: Sequence[str], sources: Sequence[Path]) -> Outputs:
        """From what was typed.

        Args:
            target: of `-o`: `-`, a file, or a folder: one that exists, ends in a slash or has no suffix.
            kind: of `--format`.
            kinds: those that can be written.

        Raises:
            click.UsageError: it cannot be meant.
        """
        if target is None and sources == [STDIO]:
            target = "-"
        if STDIO in sources and sources != [STDIO]:
            raise click.UsageError("'-' is standard input, which is one input and goes with no others")
        if target is None:
            outputs = cls(kind=kind)
        elif target == "-":
            outputs = cls(file=STDIO, kind=kind)
        elif Path(target).is_dir() or target.endswith(("/", os.sep)) or not Path(target).suffix:
            outputs = cls(folder=Path(target), kind=kind)
        else:
            suffix = Path(target).suffix.lower()[1:]
            named = _SAME.get(suffix, suffix)
            if named not in kinds:
                raise click.UsageError(
                    f"{target} ends in none of {', '.join(f'.{known}' for known in kinds)}; a folder ends in a slash"
                )
            if kind not in (None, named):
                raise click.UsageError(f"{target} cannot be a {kind}; leave out --format, or change the name")
            outputs = cls(file=Path(target), kind=named)
        if outputs.file is not None and len(sources) > 1:
            where = "standard output" if outputs.file == STDIO else f"the file {target}"
            raise click.UsageError(f"{len(sources)} inputs do not go into {where}; give -o a folder, such as out/")
        bases = Counter(outputs._base(source) for source in sources)
        if clash := next((base for base, count in bases.items() if count > 1), None):
            both = " and ".join(str(source) for source in sources if outputs._base(source) == clash)
            raise click.UsageError(f"{both} would become the same file, {clash}.*; give them folders of their own")
        return outputs

    def paths(self, source: Path, kind: str, count: int = 1) -> list[Path]:
        """The files that one input becomes: one, or numbered ones."""
        if self.file is not None and count == 1:
            return [self.file]
        if self.file == STDIO:
            raise click.UsageError(f"{source} makes {count} files, and standard output holds one; give -o a folder")
        base = self._base(source) if self.file is None else self.file.with_suffix("")
        suffix = f".{kind}" if self.file is None else self.file.suffix
        if count == 1:
            return [base.with_name(base.name + suffix)]
        digits = len(str(count - 1))
        return [base.with_name(f"{base.name}-{number:0{digits}}{suffix}") for number in range(count)]

    def _base(self, source: Path) -> Path:
        """The path without its suffix, so far as the input alone says it."""
        stem = "stdin" if source == STDIO else source.stem
        return (source.parent if self.folder is None else self.folder) / stem
