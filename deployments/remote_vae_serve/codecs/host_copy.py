"""`HostCopy`: an asynchronous copy of a tensor from device to pinned host memory, usable piece by piece while the rest is
coming."""

from __future__ import annotations

from collections.abc import Iterator

import torch

PIECE = 2**25
"""Bytes of a piece: a frame of a large video at least, so that an encoder starts long before the last one has arrived."""


class HostCopy:
    """An asynchronous device-to-host copy, started on the current CUDA stream; on the CPU the tensor itself, contiguous.

    Args:
        tensor: on the device. It is kept until the copy has ended.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._events: list[tuple[int, torch.cuda.Event]] = []
        self._source: torch.Tensor | None = None
        if tensor.device.type == "cpu":
            self.shape, self._host = tensor.shape, tensor.contiguous()
            return
        self.shape, self._source = tensor.shape, tensor
        # Pinned: only such memory is written to while the host does something else.
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        rows = max(1, PIECE * len(tensor) // max(1, tensor.nbytes))
        for start in range(0, len(tensor), rows):
            self._host[start : start + rows].copy_(tensor[start : start + rows], non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._events.append((min(start + rows, len(tensor)), event))

    @property
    def is_here(self) -> bool:
        """Whether nothing has to be waited for."""
        return not self._events

    def pieces(self) -> Iterator[torch.Tensor]:
        """Slices along the first axis, in order, each as soon as it is there."""
        start = 0
        for end, event in self._events:
            event.synchronize()  # lets go of the GIL
            yield self._host[start:end]
            start = end
        self._source = None
        if start < len(self._host):
            yield self._host[start:]

    def whole(self) -> torch.Tensor:
        """All of it."""
        if self.is_here:
            return self._host
        for _ in self.pieces():
            pass
        return self._host
