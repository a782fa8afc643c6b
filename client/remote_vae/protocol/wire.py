"""What decode and encode requests share: `Scaling`, the shape, and the protocol number of what crosses a Ray handle. The requests
are in `decode_request` and `encode_request`, the reply in `result`.

Pure: nothing here reads a socket or a file. HTTP is the Hugging Face Remote VAE protocol (query parameters, a raw body,
`shape` and `dtype` headers back); a Ray handle carries a tuple of plain values that starts with `PROTOCOL`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from remote_vae.errors import BadRequest, ProtocolMismatch
from remote_vae.protocol import parameters
from remote_vae.protocol import plain as read
from remote_vae.protocol.messages import Query
from remote_vae.protocol.parameters import Values

PROTOCOL = 4
"""Version of the tuples that cross a Ray handle; both sides must have the same."""

SHAPE = parameters.integers("shape", "Sizes of the tensor's axes: repeated keys, a JSON list or a comma list.")
DO_SCALING = parameters.boolean(
    "do_scaling", "True applies the model's own convention where no factor is sent; False applies nothing at all."
)
SCALING_FACTOR = parameters.number(
    "scaling_factor",
    "Decoding computes z / scaling_factor + shift_factor, encoding (z - shift_factor) * scaling_factor.",
)
SHIFT_FACTOR = parameters.number("shift_factor", "See scaling_factor.")
SCALING = (DO_SCALING, SCALING_FACTOR, SHIFT_FACTOR)


@dataclass(frozen=True)
class Scaling:
    """Which convention the server applies to latents: the model's own, or `z / factor + shift` with what was sent, or none;
    to latents that it encoded, the inverse.

    Raises:
        BadRequest: a factor that is zero or not finite.
    """

    own: bool = False
    factor: float | None = None
    shift: float | None = None

    def __post_init__(self) -> None:
        if self.factor is not None and (not math.isfinite(self.factor) or self.factor == 0):
            raise BadRequest(
                f"scaling_factor is {self.factor}; expected a finite number other than 0", parameter="scaling_factor"
            )
        if self.shift is not None and not math.isfinite(self.shift):
            raise BadRequest(f"shift_factor is {self.shift}; expected a finite number", parameter="shift_factor")

    @classmethod
    def of(cls, values: Values, own_unless_said: bool = False) -> Scaling:
        """`do_scaling=False` wins; then factors that were sent; then `do_scaling=True`; then nothing, or `own_unless_said`."""
        do_scaling = DO_SCALING.of(values)
        given = cls(False, SCALING_FACTOR.of(values), SHIFT_FACTOR.of(values))  # checked also where it is moot
        if do_scaling is False:
            return cls()
        own = do_scaling or own_unless_said
        return cls(own=True) if own and given == cls() else given

    @classmethod
    def from_plain(cls, plain: Any) -> Scaling:
        """From what `to_plain` gives. Raises BadRequest."""
        own, factor, shift = read.fields(plain, 3, "scaling")
        return cls(
            read.boolean(own, "do_scaling"),
            read.optional(read.number, factor, "scaling_factor"),
            read.optional(read.number, shift, "shift_factor"),
        )

    def to_plain(self) -> tuple[bool, float | None, float | None]:
        return self.own, self.factor, self.shift

    def to_query(self) -> Query:
        if self.factor is None and self.shift is None:
            return [("do_scaling", str(self.own))]
        sent = (("scaling_factor", self.factor), ("shift_factor", self.shift))
        return [(name, str(value)) for name, value in sent if value is not None]


def check_protocol(plain: Any, peer: str) -> None:
    """Refuse a tuple of another protocol version, whose fields would be misread, with both numbers named."""
    theirs = plain[0] if isinstance(plain, tuple) and plain else None
    if read.as_integer(theirs) != PROTOCOL:
        raise ProtocolMismatch(
            f"This side speaks handle protocol {PROTOCOL}, the {peer} sent {theirs!r:.20}; "
            "install the same version of remote-vae on both"
        )
