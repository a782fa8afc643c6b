"""A run of the command line over its inputs: a few in flight, one that fails stops no other, and what became of each."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import click

from remote_vae.cli import files
from remote_vae.cli.files import FileError
from remote_vae.errors import (
    ConnectionFailed,
    ConnectionLost,
    DeadlineExceeded,
    ModelFailed,
    RemoteVAEError,
    TimedOut,
    Unauthorized,
    Unavailable,
    UnknownModel,
    UnknownRoute,
    WrongMethod,
)
from remote_vae.transports.waiting import OnWait, Waiting

FAILED, USAGE, UNAVAILABLE = 1, 2, 3
"""Exit codes."""

SHOWN = 10
"""How many files a person is told by name."""

_AWAY = (ConnectionFailed, ConnectionLost, DeadlineExceeded, TimedOut, Unavailable)
_SAME_FOR_ALL = (ConnectionFailed, ModelFailed, Unauthorized, UnknownModel, UnknownRoute, WrongMethod)
Failure = RemoteVAEError | FileError
Made = list[tuple[Path, bytes]]
"""Files to write, and what is to be in them."""
Work = Callable[[Path], Made]
"""What is done for one input. Raises RemoteVAEError or FileError."""


def exit_code(failures: Sequence[Failure]) -> int:
    """0 for none; UNAVAILABLE where time may mend them all; else FAILED."""
    if not failures:
        return 0
    return UNAVAILABLE if all(isinstance(failure, _AWAY) for failure in failures) else FAILED


def as_fields(failure: Failure) -> dict[str, Any]:
    """The failure for machines: `error`, `code` and, where they are known, `parameter`, `retry_after`, `request_id`."""
    fields: dict[str, Any] = {"error": failure.message, "code": failure.code}
    for name in ("parameter", "retry_after", "request_id"):
        if (value := getattr(failure, name, None)) is not None:
            fields[name] = value
    return fields


@dataclass
class Run:
    """What became of the inputs.

    Attributes:
        written: the files that each became; none for one that was there already.
        failed: why each of the others did not.
        stopped: a failure that each of the others would meet as well, such as a server that nobody can reach.
    """

    sources: Sequence[Path]
    written: dict[Path, list[Path]] = field(default_factory=dict)
    failed: dict[Path, Failure] = field(default_factory=dict)
    stopped: Failure | None = None

    def go(self, work: Work, workers: int) -> None:
        """Do `work` for each input, `workers` at a time, and write what it makes; once stopped, the others are not tried."""
        with progress(len(self.sources)) as tick:
            for source, future in _as_completed(self.sources, work, workers, lambda: self.stopped is not None):
                try:
                    made = future.result()
                    for path, data in made:
                        files.write(path, data)
                    self.written[source] = [path for path, _ in made]
                except (RemoteVAEError, FileError) as failure:
                    self.failed[source] = failure
                    if isinstance(failure, _SAME_FOR_ALL):
                        self.stopped = failure
                tick()
        if self.stopped is not None:
            self.failed |= {s: self.stopped for s in self.sources if s not in self.written and s not in self.failed}

    @property
    def exit_code(self) -> int:
        return exit_code(list(self.failed.values()))

    def as_fields(self) -> dict[str, Any]:
        """For machines: `files` in the order they were given and, where something failed, `error` and `code` at the top."""
        listed = [
            {"input": str(source)}
            | (
                as_fields(self.failed[source])
                if source in self.failed
                else {"outputs": [str(path) for path in self.written[source]]}
            )
            for source in self.sources
        ]
        fields: dict[str, Any] = {"files": listed, "failed": len(self.failed)}
        if not self.failed:
            return fields
        codes = {failure.code for failure in self.failed.values()}
        if len(self.sources) == 1:
            return as_fields(next(iter(self.failed.values()))) | fields
        return {"error": self._sum, "code": codes.pop() if len(codes) == 1 else "several"} | fields

    @property
    def _sum(self) -> str:
        return f"{len(self.failed)} of {len(self.sources)} inputs failed"

    def tell(self) -> None:
        """Say it to a person: what was written on standard output, what failed at the end, on standard error."""
        paths = [path for source in self.sources for path in self.written.get(source, []) if path != files.STDIO]
        if len(paths) > SHOWN and sys.stdout.isatty():
            click.echo(f"{len(paths)} files written, {paths[0]} to {paths[-1]}")
        else:
            click.echo("".join(f"{path}\n" for path in paths), nl=False)
        alike: dict[str, list[Path]] = {}
        for source in self.sources:
            if failure := self.failed.get(source):
                alike.setdefault(getattr(failure, "of_many", None) or failure.message, []).append(source)
        for sentence, sources in alike.items():
            if len(sources) > 1:
                listed = ", ".join(map(str, sources[:3])) + (
                    f" and {len(sources) - 3} more" if len(sources) > 3 else ""
                )
                click.echo(f"{listed}: {sentence}", err=True)
                continue
            failure = self.failed[sources[0]]
            about = "" if str(sources[0]) in failure.message else f"{sources[0]}: "
            click.echo(f"{about}{failure}", err=True)  # with its request's id, where it has one
        if self.failed and len(self.sources) > 1:
            click.echo(self._sum, err=True)


@contextlib.contextmanager
def progress(length: int) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error, where a person watches and there is more than one to wait for; yields what moves it."""
    if length < 2 or not sys.stderr.isatty():
        yield lambda: None
        return
    with click.progressbar(length=length, show_pos=True, file=sys.stderr) as bar:
        yield lambda: bar.update(1)


@contextlib.contextmanager
def waiting_line(length: int) -> Iterator[OnWait | None]:
    """One line on standard error, where a person watches, that says what the one input waits for; several have a progress bar.
    Yields what is told of it, or None."""
    if length > 1 or not sys.stderr.isatty():
        yield None
        return

    def tell(waiting: Waiting) -> None:
        text = "".join(letter if letter.isprintable() else " " for letter in str(waiting))  # its reason is a server's
        click.echo(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}", nl=False, err=True)

    try:
        yield tell
    finally:
        click.echo("\r\x1b[K", nl=False, err=True)


def _as_completed(
    sources: Sequence[Path], work: Work, workers: int, stopped: Callable[[], bool]
) -> Iterator[tuple[Path, Future[Made]]]:
    """The inputs as they are done; no more than `workers` are begun ahead of whoever takes them."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="remote-vae-run")
    waiting, pending = iter(sources), dict[Future[Made], Path]()
    try:
        while True:
            if not stopped():
                for source in islice(waiting, workers - len(pending)):
                    pending[pool.submit(work, source)] = source
            if not pending:
                return
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                yield pending.pop(future), future
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after a Ctrl-C nobody waits for answers
