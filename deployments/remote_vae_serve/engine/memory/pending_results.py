"""`PendingResults`: results that are made and not yet gone, on their way to the host, through a codec or to a client. They take
memory of the budget that the next request counts on."""

from __future__ import annotations

import threading
import weakref

import torch

from remote_vae.errors import Unavailable
from remote_vae_serve.codecs.host_copy import HostCopy

CLIENT_WAIT_S = 5.0
"""A client that reads slowly holds its result for long; those behind it must not wait for it for ever."""


class PendingResults:
    """Knows what is held, without being told when it is let go of: what counts is that the memory is free. Thread-safe."""

    def __init__(self) -> None:
        # Of a lock that its own thread may enter again: the garbage collector frees results where it pleases.
        self._changed = threading.Condition(threading.RLock())
        self._sizes: dict[int, int] = {}

    @property
    def held(self) -> int:
        """Bytes."""
        with self._changed:
            return sum(self._sizes.values())

    def to_host(self, result: torch.Tensor) -> HostCopy:
        """Start a result on its way to the host, and count its memory until it is gone."""
        result = result.contiguous()  # or the copy would be of another storage
        self.put(result)
        return HostCopy(result)

    def put(self, result: torch.Tensor) -> None:
        """Count the result's memory until it is given back; that which it shares with another once."""
        storage = result.untyped_storage()
        with self._changed:
            if storage._cdata in self._sizes:
                return
            self._sizes[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self._forget, storage._cdata).atexit = False

    def wait(self, spare: int) -> None:
        """Return once no more than so many bytes are held, or none.

        Raises:
            Unavailable: they were not let go of in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._sizes or self.held <= spare, CLIENT_WAIT_S):
                raise Unavailable(
                    f"Results that clients have not yet taken hold {self.held / 2**20:.0f} MiB of the memory that this request "
                    "needs; try again",
                    retry_after=5,
                )

    def _forget(self, key: int) -> None:
        with self._changed:
            self._sizes.pop(key, None)
            self._changed.notify_all()
