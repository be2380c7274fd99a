"""How far memory grows while one call runs."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def peak_growth(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes by which memory grew at the highest point of a call, its outputs included; None where that can't be known.

    On a GPU, what torch's allocator handed out. On the CPU, resident memory of the process, which also sees what
    native code allocates past torch: the kernel's high-water mark is reset first, and free memory that the C library
    holds is given back, so that reusing it counts. What a contestant keeps from one call to the next is not in it.

    Python's collector of cycles rests meanwhile: what it found would be of before the call, and taken off its growth.
    """
    with _uncollected():
        return _peak_growth(call, device)


def _peak_growth(call: Callable[[], object], device: torch.device) -> int | None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not _reset_high_water_mark():
        return None
    before = _resident("VmRSS")
    call()
    return max(0, _resident("VmHWM") - before)


@contextmanager
def _uncollected() -> Iterator[None]:
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _reset_high_water_mark() -> bool:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return False
    trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): 5 resets VmHWM
    except OSError:
        return False
    return True


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
