"""Settings of the middleware, out of the environment: Serve gives it no arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from remote_vae_serve.allowed_origins import read_origins

TOKENS = "REMOTE_VAE_TOKENS"
MAX_BODY_MIB = "REMOTE_VAE_MAX_BODY_MIB"
ALLOW_ORIGINS = "REMOTE_VAE_ALLOW_ORIGINS"
"""Environment variables of ours, which the proxy's processes read, and those of deployments."""


@dataclass(frozen=True)
class Settings:
    """What the environment says.

    Attributes:
        max_body: bytes of the largest request body.
        tokens: any of them lets a request in; empty lets everybody in. Not part of the repr, which Serve may log.
        allow_origins: pages that may use the server from a browser, or `*`; None where the environment says nothing of them.
        linger_s, linger_idle_s: for how long what still comes of a refused body is dropped, in all and between two pieces.
            A connection closed with bytes unread is reset, and the client may lose the answer with it.
    """

    max_body: int
    tokens: tuple[str, ...] = field(default=(), repr=False)
    allow_origins: tuple[str, ...] | None = None
    linger_s: float = 10.0
    linger_idle_s: float = 2.0

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Settings:
        """Read them. Raises ValueError with a sentence that names the variable, and never a token."""
        return cls(
            _max_body(environment.get(MAX_BODY_MIB)),
            _tokens(environment.get(TOKENS)),
            _allow_origins(environment.get(ALLOW_ORIGINS)),
        )


def _max_body(written: str | None) -> int:
    if written is None:
        # Here, since HAProxy's start waits for the names above, and not for pydantic.
        from remote_vae_serve.config import IngressConfig

        return int(IngressConfig.model_validate({}).max_body_mib * 2**20)
    try:
        mib = float(written)
    except ValueError:
        mib = 0.0
    if not 0 < mib < math.inf:
        raise ValueError(f"{MAX_BODY_MIB} is {written!r}; expected a number of MiB above 0")
    return int(mib * 2**20)


def _tokens(written: str | None) -> tuple[str, ...]:
    if written is None:
        return ()
    tokens = tuple(token for token in map(str.strip, written.split(",")) if token)
    if not tokens:  # an empty secret must not open the door
        raise ValueError(f"{TOKENS} is set and holds no token; set one, or unset it to let everybody in")
    if not all(token.isascii() and token.isprintable() and " " not in token for token in tokens):
        raise ValueError(f"A token in {TOKENS} has a character that no header can carry; use letters and digits")
    return tokens


def _allow_origins(written: str | None) -> tuple[str, ...] | None:
    if written is None:
        return None
    try:
        return read_origins(origin for origin in written.split(",") if origin.strip())
    except ValueError as error:
        raise ValueError(f"{ALLOW_ORIGINS}: {error}") from None
