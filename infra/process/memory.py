"""Memory: how much this process may still take, how tensors get to a GPU, what a long-lived worker gives back."""

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

GIB = 2**30
HELD_BYTES = 640 * 2**20


@cache
def _trim() -> Any:
    """glibc's `malloc_trim`, None in another C library."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def free_memory(device: str) -> int:
    """Bytes that this process can still allocate: on a GPU the unused part of torch's cache too, else host memory.

    For refusing what cannot fit. What decides between two roundings must not depend on it.
    """
    if device.startswith("cuda"):
        import torch

        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    import psutil

    return psutil.virtual_memory().available


def to_device(tensor: "torch.Tensor", device: "torch.device | str") -> "torch.Tensor":
    """A CPU tensor on `device`. To a GPU it goes from pinned memory: from other memory the host waits for the copy,
    which waits for all work before it."""
    if str(device).startswith("cuda"):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def give_back_memory() -> None:
    """Have the C library return its free memory where this process holds more than HELD_BYTES.

    glibc keeps freed blocks below 32 MiB for reuse; images of many sizes leave holes there that only grow. Taking the
    memory anew costs a tenth of a 2K image's time, so a process that holds little is left alone.
    """
    import psutil

    trim = _trim()
    if trim is not None and psutil.Process().memory_info().rss > HELD_BYTES:
        trim(0)
