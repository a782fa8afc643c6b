"""Retries with exponential backoff, and which errors are worth one: `RetryPolicy`, time-outs, deadline and retries; `RetryState`,
those of one call."""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass

from remote_vae.errors import (
    BadRequest,
    ConnectionFailed,
    ConnectionLost,
    DeadlineExceeded,
    ModelFailed,
    RemoteVAEError,
    TimedOut,
    Unavailable,
    UnknownRoute,
    UntrustedCertificate,
)

Timeout = float | tuple[float | None, float | None] | None
"""Seconds to wait for one try: for everything, or (to connect, for the answer); None waits for ever."""

DEFAULT_TIMEOUT: Timeout = (10.0, 300.0)  # a cold model loads its weights before it answers
RETRIES = 3
FIRST_PAUSE_S = 0.5
LONGEST_BACKOFF_S = 8.0
"""Where the server asks for nothing: it may be back at any moment, however long it has been away."""
LONGEST_PAUSE_S = 300.0
"""A server that asks for more is not waited for."""
LONGEST_WAIT_S = 10**6
"""A socket's time-out holds no more than 2**31 milliseconds."""
WORTH_ANOTHER = (Unavailable, ConnectionFailed, ConnectionLost)
"""Errors that time may mend; a decode sent twice does no harm."""
WORTH_ANOTHER_BY_A_DEADLINE = (TimedOut, DeadlineExceeded)
"""Where one try takes its time-out, and the call has longer: a node that has fallen silent says nothing, another may answer."""
NOT_WORTH_ANOTHER = (ModelFailed, UntrustedCertificate)
"""Those of them that it will not."""


@dataclass(frozen=True)
class RetryPolicy:
    """The retry policy of a client: time-out of one try, deadline of all, number of retries.

    Attributes:
        timeout: seconds for one try.
        deadline: seconds for all of them and the pauses between; None for no such limit.
        retries: how often to try again where the server is busy or cannot be reached; None for `RETRIES` times or, where there is
            a deadline, until it.

    Raises:
        BadRequest: naming the argument.
    """

    timeout: Timeout = DEFAULT_TIMEOUT
    deadline: float | None = None
    retries: int | None = None

    def __post_init__(self) -> None:
        for name, value, parts in (
            ("timeout", self.timeout, self._parts),
            ("deadline", self.deadline, (self.deadline,)),
        ):
            if not (all(map(_is_wait, parts)) and len(parts) == (2 if isinstance(value, tuple) else 1)):
                raise BadRequest(
                    f"{name} is {value!r}; expected seconds above 0, at most {LONGEST_WAIT_S}, a pair of them for timeout, "
                    "or None",
                    parameter=name,
                )
        retries = self.retries
        if retries is not None and (isinstance(retries, bool) or not isinstance(retries, int) or retries < 0):
            raise BadRequest(
                f"retries is {retries!r}; expected a whole number, 0 or more, or None", parameter="retries"
            )

    @property
    def most_retries(self) -> float:
        """How often to try again at most; infinite where only the deadline ends it."""
        if self.retries is not None:
            return self.retries
        return RETRIES if self.deadline is None else math.inf

    @property
    def _parts(self) -> tuple[float | None, ...]:
        return self.timeout if isinstance(self.timeout, tuple) else (self.timeout,)

    @property
    def connect_and_answer(self) -> tuple[float | None, float | None]:
        """Seconds to wait for a connection, and for each packet of the answer after it."""
        return self._parts[0], self._parts[-1]

    @property
    def answer_s(self) -> float | None:
        """Seconds to wait for an answer once there is a connection."""
        return self._parts[-1]

    @property
    def one_try_s(self) -> float | None:
        """Seconds for one try as a whole."""
        return None if None in self._parts else sum(part for part in self._parts if part is not None)


def _is_wait(seconds: object) -> bool:
    if seconds is None:
        return True
    return isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and 0 < seconds <= LONGEST_WAIT_S


DEFAULT_POLICY = RetryPolicy()
ENDLESS = RetryPolicy(timeout=None)
"""Of a server's own process, whose HTTP side keeps the deadline."""


class RetryState:
    """The retry state of one call: retries and time that are left. Not thread-safe: each call has its own."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._failed = 0
        self._give_up = None if policy.deadline is None else time.monotonic() + policy.deadline

    def left_s(self, one_try_s: float | None) -> float | None:
        """Seconds that the try which begins now may take, of those that one may; None for ever. Raises TimedOut where the
        deadline has passed: a call can have waited for its turn longer than that."""
        if self._give_up is None:
            return one_try_s
        left = self._give_up - time.monotonic()
        if left <= 0:
            raise TimedOut(f"The deadline of {self._policy.deadline} s passed before the server could be asked")
        return left if one_try_s is None else min(left, one_try_s)

    def pause_after(self, error: RemoteVAEError) -> float:
        """Seconds to wait before the next try: what the server asked for, else twice as long as the last, with some chance in
        it so that clients do not come back all at once. Raises the error where no other try is worth it."""
        self._failed += 1
        asked = error.retry_after or 0.0
        if not self._is_worth_another(error) or asked > LONGEST_PAUSE_S or self._failed > self._policy.most_retries:
            raise error
        backoff = min(FIRST_PAUSE_S * 2.0 ** min(self._failed - 1, 32), LONGEST_BACKOFF_S)
        pause = max(asked, backoff) * random.uniform(1.0, 1.25)
        if self._give_up is not None and time.monotonic() + pause >= self._give_up:
            raise error
        return pause

    def _is_worth_another(self, error: RemoteVAEError) -> bool:
        if isinstance(error, UnknownRoute):  # a proxy that is coming up knows no route yet, and says when it will
            return error.retry_after is not None
        if isinstance(error, WORTH_ANOTHER_BY_A_DEADLINE):
            return self._give_up is not None
        return isinstance(error, WORTH_ANOTHER) and not isinstance(error, NOT_WORTH_ANOTHER)
