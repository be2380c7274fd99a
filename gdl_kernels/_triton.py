"""What the launchers of Triton kernels share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

#: Called with what Triton compiled for each launch, None in its interpreter. Tuning looks for spills there.
observers: list[Callable[[Any], None]] = []


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **constants: Any) -> None:
    """Launch a kernel on the current stream of a device.

    Args:
        programs: nothing is launched for none.
        constants: what it is compiled for, ``num_warps`` and ``num_stages`` included.
    """
    if programs:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            compiled = kernel[(programs,)](*args, **constants)
        for observe in observers:
            observe(compiled)


# Triton's own of these go through its constexprs, which takes 3 µs.


def ceil_div(number: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-number // divisor)


def power_of_two(number: int) -> int:
    """The smallest that is as large; 0 for 0."""
    return 1 << (number - 1).bit_length() if number else 0


@functools.cache
def capability(device: torch.device) -> int:
    """As in ``sm_90``."""
    if device.type != "cuda":
        return 90  # the interpreter has no limits
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
