"""The configuration that Serve writes for HAProxy, edited: for most of what is here Serve has no setting.

An edit names a section, and either one line of it or its end. Where a Ray writes neither, that edit is left out and said so: its
user then gets Serve's own text, or limit, or an open port, and HAProxy starts all the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from remote_vae_serve.haproxy import replies

LOOPBACK = "127.0.0.1"
MAX_HEADERS = 1000
"""Of a request; by itself HAProxy takes 101. Serve's Python proxy counts none, and takes 64 KiB of them."""


@dataclass(frozen=True)
class Edit:
    """One change of the configuration.

    Attributes:
        what: what it is for, to say that it was left out.
        section: the line that begins its section.
        lines: what is written.
        instead_of: a pattern that is found in one line of the section, and is what `lines` replace. None: they follow at the end
            of the section.
    """

    what: str
    section: str
    lines: tuple[str, ...]
    instead_of: str | None = None

    def made(self, text: Sequence[str]) -> list[str] | None:
        """The lines of the configuration with this change; None where it has no place in them."""
        if self.section not in text:
            return None
        begin = text.index(self.section) + 1
        end = next((at for at in range(begin, len(text)) if text[at][:1] not in ("", " ", "\t", "#")), len(text))
        if self.instead_of is None:
            return [*text[:end], *(f"    {line}" for line in self.lines), *text[end:]]
        found = [at for at in range(begin, end) if re.search(self.instead_of, text[at])]
        if len(found) != 1:
            return None
        (at,) = found
        lines = "\n    ".join(self.lines)
        return [*text[:at], *re.sub(self.instead_of, lambda _: lines, text[at]).split("\n"), *text[at + 1 :]]


def edited(
    text: str,
    *,
    metrics_host: str = LOOPBACK,
    has_tokens: bool = False,
    allow_origins: Sequence[str] = (),
    left_out: Callable[[str], None] = lambda _: None,
) -> str:
    """The configuration as we want it.

    Args:
        text: as Serve writes it.
        metrics_host: the address on which metrics are told; statistics are on loopback.
        has_tokens: whether a request needs one. The tokens themselves stand nowhere here.
        allow_origins: pages that are told HAProxy's own errors as well, or `*`; as `read_origins` gives them.
        left_out: told of each edit that has no place in the text.
    """
    lines = text.splitlines()
    for edit in _edits(metrics_host, has_tokens, allow_origins):
        if (made := edit.made(lines)) is None:
            left_out(edit.what)
        else:
            lines = made
    return "\n".join(lines) + "\n"


def _edits(metrics_host: str, has_tokens: bool, allow_origins: Sequence[str]) -> Iterator[Edit]:
    yield Edit("more headers", "global", (f"tune.http.maxhdr {MAX_HEADERS}",))
    yield Edit(
        "JSON for HAProxy's own errors, and who asked",
        "defaults",
        (
            "option forwardfor",
            "unique-id-format %[uuid]",
            # Who dies under a request is a 502. Where the connection to it was used before, HAProxy would close that of the
            # client without a word instead: it cannot tell a death from an idle connection that is closed just then.
            "option http-server-close",
            *replies.http_errors(),
        ),
    )
    yield Edit(
        "JSON where no application is",
        "backend default_backend",
        (*([replies.preflight()] if allow_origins else []), replies.no_application()),
        r"\bhttp-request return status 404 .*",
    )
    if allow_origins:
        yield Edit(
            "CORS of HAProxy's own errors",
            "frontend http_frontend",
            # Where a rule comes after `use_backend`, HAProxy warns.
            (*replies.cors(allow_origins), "acl routes path -i /-/routes"),
            r"\bacl routes path -i /-/routes$",
        )
    # By themselves both listen on every address and ask nobody for a token.
    yield Edit("metrics on loopback", "frontend prometheus", (metrics_host,), r"(?<=\bbind )\S*(?=:\d+$)")
    yield Edit("statistics on loopback", "listen stats", (LOOPBACK,), r"(?<=\bbind )\S*(?=:\d+$)")
    if has_tokens:  # the request goes on to an application, whose middleware asks for one
        yield Edit(
            "a token for /-/routes",
            "frontend http_frontend",
            ("# Routes are told to who has a token, by an application.",),
            r"\bhttp-request return .* if routes$",
        )
