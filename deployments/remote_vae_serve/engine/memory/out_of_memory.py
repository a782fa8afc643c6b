"""Out of memory, in the words of whatever ran out of it."""

from __future__ import annotations

import torch

OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "status_alloc_failed")
"""In the words of the CPU's allocator and of CUDA's libraries (CUBLAS_STATUS_ALLOC_FAILED), which raise a plain RuntimeError."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, in the words of any allocator."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in str(error).lower() for words in OUT_OF_MEMORY
    )


def load_reason(error: Exception, device: str) -> str:
    """Why weights that are here could not be loaded, in words."""
    text = " ".join(str(error).split())
    if is_out_of_memory(error):
        return f"out of memory on {device}: {text[:200] or 'the weights do not fit'}; give it more, or a smaller dtype"
    return f"{type(error).__name__}: {text[:500]}"
