"""Memory that the C library keeps for the next step."""

from __future__ import annotations

import ctypes

# Of mallopt(3), glibc's.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, of which the next step needs as much again.

    glibc gives blocks of 32 MB and more back at once, and each page of a new one costs a trip into the system: of a
    ProGAN's step at 256×256 a fifth of the time, of its forward pass a third (2 cores of a Xeon in a virtual machine).
    Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never
