"""Checks that the public functions of several ops make of their arguments, with one message for each mistake."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype that sums over ``x`` are kept in: float32, for float64 float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, which asks the dispatcher even where it has nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


#: Whether autocast is on for any device: to ask that of one takes longer, and most often it is on for none.
autocast_is_on = torch._C._is_any_autocast_enabled


def in_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of a call as autocast has those of PyTorch's own attention: what is floating, and not double."""
    return tuple(map(_in_autocast, tensors))


def _in_autocast(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def check_floating(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}")


def check_planes(name: str, x: Tensor) -> None:
    """Images whose planes have statistics."""
    check_floating(name, x)
    if x.dim() < 3:
        raise ValueError(f"{name} must be (N, C, *spatial) with one spatial dimension or more, got {tuple(x.shape)}")
    if x.numel() == 0 and 0 in x.shape[2:]:
        raise ValueError(f"{name} must have planes of at least one pixel, got shape {tuple(x.shape)}")


def check_parameter(name: str, parameter: Tensor, shapes: Sequence[tuple[int, ...]], x: Tensor) -> None:
    """What is given beside the images ``x``: in one of the shapes, and no wider than their sums."""
    check_floating(name, parameter)
    if parameter.dtype == torch.float64 != x.dtype:
        raise TypeError(f"{name} must be float32, float16 or bfloat16 beside {x.dtype} images, got {parameter.dtype}")
    if parameter.shape not in shapes:
        wanted = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"{name} must be {wanted}, got shape {tuple(parameter.shape)}")
    if parameter.device != x.device:
        raise ValueError(f"{name} must be on the device of the images, {x.device}, got {parameter.device}")


def check_positive(name: str, value: float) -> None:
    if isinstance(value, (int, float)) and 0 < value < math.inf:
        return
    check_finite(name, value, "positive and finite")
    raise ValueError(f"{name} must be positive and finite, got {value}")


def check_finite(name: str, value: float, wanted: str = "finite") -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be {wanted}, got {value}")
