"""The rule for numbers: at most twice the error that plain PyTorch makes."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_accurate(
    ours: Tensor, plain: Tensor, exact: Tensor, what: str = "output", *, terms: Tensor | None = None, ulps: int = 2
) -> None:
    """Ours against float64, allowed twice plain PyTorch's error, in the largest error and in the root mean square.

    Args:
        ours: what a kernel gave.
        plain: what plain PyTorch gives in the same dtype on the same input.
        exact: the same in float64.
        what: named in the failure.
        terms: where ``exact`` is a difference that may cancel, what it is the difference of, in any shape.

    The floor, for inputs on which plain PyTorch happens to be exact, is ``ulps`` units in the last place of the largest
    value (or root mean square) of ``terms``. Where the exact result is not finite in our dtype, ours must be the same.
    """
    assert ours.shape == plain.shape == exact.shape, f"{what}: shapes {ours.shape}, {plain.shape}, {exact.shape}"
    assert ours.dtype == plain.dtype, f"{what}: {ours.dtype}, but plain PyTorch gives {plain.dtype}"
    assert exact.dtype == torch.float64, f"{what}: exact is {exact.dtype}"
    ours_64, plain_64, exact = (t.detach().double().cpu() for t in (ours, plain, exact))
    special = ~exact.to(ours.dtype).isfinite()
    torch.testing.assert_close(ours_64[special], exact.to(ours.dtype).double()[special], equal_nan=True)
    ours_64, plain_64, exact = (t[~special] for t in (ours_64, plain_64, exact))
    if exact.numel() == 0:
        return
    assert ours_64.isfinite().all(), f"{what}: {(~ours_64.isfinite()).sum()} of {exact.numel()} values are not finite"
    scale = exact if terms is None else terms.detach().double().cpu()
    # Against float64 nothing here is more exact: both are float64, and differ by how they round along the way.
    floor = (256 if ours.dtype == torch.float64 else ulps) * torch.finfo(ours.dtype).eps
    for name, size in (("largest", _largest), ("rms", _root_mean_square)):
        error, allowed = size(ours_64 - exact), 2 * size(plain_64 - exact) + floor * size(scale)
        assert error <= allowed, f"{what}: {name} error {error:.3g}, allowed {allowed:.3g}"


def _largest(values: Tensor) -> float:
    return values.abs().max().item()


def _root_mean_square(values: Tensor) -> float:
    return values.square().mean().sqrt().item()
