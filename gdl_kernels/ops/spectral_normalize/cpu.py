"""Launches the C++ kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ... import _native

#: A place in the list of weights, and the sigma there, which is not finite; None if all are.
NotFinite = tuple[int, float] | None


def forward(
    outputs: tuple[list[Tensor], Tensor], weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor],
    n_power_iterations: int, eps: float, semantics: str, _backend: str,
) -> None:  # fmt: skip
    _native.cpu_module().spectral_normalize_forward(
        *outputs, weights, us, vs, n_power_iterations, semantics == "biggan", eps, torch.get_num_threads()
    )


def finish(found: Tensor, us: Sequence[Tensor], vs: Sequence[Tensor], update: bool) -> NotFinite:
    """After forward: write the new vectors to ``us`` and ``vs`` if they are to be updated and all sigmas are finite."""
    not_finite: NotFinite = _native.cpu_module().spectral_normalize_finish(found, us, vs, update)
    if update and not not_finite:
        _tell_autograd(us, vs)
    return not_finite


def forward_and_finish(
    out: list[Tensor], weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], n_power_iterations: int,
    eps: float, semantics: str, *, update: bool,
) -> NotFinite:  # fmt: skip
    """Both, where nobody else asks for what was found: it takes memory of its own, not a tensor."""
    native = _native.cpu_module()
    native.prefer_huge_pages(out)
    not_finite: NotFinite = native.spectral_normalize_forward_and_finish(
        out, weights, us, vs, n_power_iterations, semantics == "biggan", eps, update, torch.get_num_threads()
    )
    if update and not not_finite:
        _tell_autograd(us, vs)
    return not_finite


def _tell_autograd(us: Sequence[Tensor], vs: Sequence[Tensor]) -> None:
    """They were changed in place: who has saved them for a gradient must not use them."""
    increment_version([*us, *vs])


def backward(
    grad_weights: list[Tensor], grads: list[Tensor], weights: list[Tensor], vectors: Tensor, _backend: str
) -> None:
    _native.cpu_module().spectral_normalize_backward(grad_weights, grads, weights, vectors, torch.get_num_threads())
