"""Calls bindings of the CUDA kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native


def launch(name: str, out: Tensor, *args: Any) -> None:
    """``name(out, *args, stream)``, on the device of ``out`` and its current stream.

    ``torch.cuda.device`` and ``torch.cuda.Stream`` take longer to make than a launch does.
    """
    binding = getattr(_native.cuda_module(), name)
    device = out.get_device()
    stream = torch._C._cuda_getCurrentRawStream(device)
    if device == torch.cuda.current_device():
        binding(out, *args, stream)
    else:
        with torch.cuda.device(device):
            binding(out, *args, stream)
