"""Memory that a long-lived worker has freed, given back to the system."""

import ctypes
from functools import cache
from typing import Any

HELD_BYTES = 640 * 2**20


@cache
def _trim() -> Any:
    """glibc's `malloc_trim`, None in another C library."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back_memory() -> None:
    """Have the C library return its free memory where this process holds more than HELD_BYTES.

    glibc keeps freed blocks below 32 MiB for reuse; images of many sizes leave holes there that only grow. Taking the
    memory anew costs a tenth of a 2K image's time, so a process that holds little is left alone.
    """
    import psutil

    trim = _trim()
    if trim is not None and psutil.Process().memory_info().rss > HELD_BYTES:
        trim(0)
