"""When memory ran out: what libraries raise then."""

from __future__ import annotations

import errno

_TOLD = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
"""What torch's RuntimeErrors say: its CPU allocator, its file mapping, CUDA's, MPS's and other backends' allocators."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory was not enough."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _TOLD)
