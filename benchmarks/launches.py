"""How many kernels one call starts on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def launches(call: Callable[[], object], device: torch.device) -> int | None:
    """Kernels, copies and fills that the GPU ran for a call; None on a CPU, where nothing is launched."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize(device)
    events = profiled.events() or []
    return sum(event.device_type == DeviceType.CUDA and not event.is_user_annotation for event in events)
