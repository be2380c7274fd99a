"""Spectral normalisation of many matrices at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._direct import DIRECT, DISPATCHED, way_of
from . import cpu, op, reference, vectors


class NotFinite(ValueError):
    """A weight has no finite spectral norm.

    Attributes:
        index: its place in the list.
        sigma: what came out.
    """

    def __init__(self, index: int, sigma: float, name: str) -> None:
        super().__init__(f"{name} must be finite, and so must its spectral norm, which is {sigma}")
        self.index = index
        self.sigma = sigma


def spectral_normalize(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    *,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    update: bool = True,
    semantics: str = "torch",
    backend: str | None = None,
) -> list[Tensor]:
    """Divide matrices by their largest singular values, all at once (Miyato et al., arXiv 1802.05957).

    ``W / sigma`` with ``sigma = u' W v`` after ``n_power_iterations`` steps of the power method, which begin at the
    given vectors, both of length 1. With ``semantics="torch"`` a step is ``u = normalize(W v)``, then
    ``v = normalize(W' u)``, as ``torch.nn.utils.parametrizations.spectral_norm`` takes it; with ``"biggan"`` first
    ``v``, then ``u``. ``normalize(x) = x / max(|x|, eps)``.

    The gradient takes u and v for constants: ``dW = (G - <G, W / sigma> u v') / sigma``. It uses the vectors that the
    forward pass has computed, not those in ``us`` and ``vs``: several forward passes may come before a backward pass.

    Args:
        weights: matrices ``(out, ...)`` of one dtype on one device, floating point, any strides. What is more than a
            matrix, as the weight of a convolution, counts as ``weight.flatten(1)``.
        us: for each weight the left vector, ``(out,)``. In the weight's dtype or a wider one.
        vs: for each weight the right vector, as long as a row.
        n_power_iterations: 0 takes the vectors as they are.
        eps: the smallest length that is divided by.
        update: write the new vectors to ``us`` and ``vs``.
        semantics: ``"torch"`` or ``"biggan"``.
        backend: overrides the backend of this call.

    Returns:
        For each weight a tensor like it. Accumulates in float32, in float64 for float64. Differentiable without limit,
        under ``torch.compile`` once.

    Raises:
        ValueError: if lengths, shapes or devices don't fit, or a number is out of range. On the CPU, outside of
            ``torch.compile``: if a sigma is not finite; then ``us`` and ``vs`` stay as they were.
        TypeError: if something is not a list of floating point tensors of one dtype, or not a number.
        RuntimeError: if ``backend`` was given and can't serve the call.
    """
    chosen = _serving(backend, weights, us, vs, n_power_iterations, eps, update, semantics)
    if not weights:
        return []
    update = update and n_power_iterations > 0
    call = weights, us, vs, n_power_iterations, eps, semantics
    if chosen == "cpu":
        way = way_of("gdl_kernels::spectral_normalize", (weights, us, vs, chosen))
        if way != DISPATCHED:
            return _past_the_dispatcher(way, call, update)
    if chosen == "reference":
        out, new_us, new_vs, sigmas = reference.spectral_normalize(*call)
    else:
        out, found = op.forward(*call, chosen)
        sigmas, new_us, new_vs = vectors.parts(found, weights)
    # On a GPU to look would be to wait for it.
    if sigmas.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_finite(sigmas)
    if update:
        with torch.no_grad():
            torch._foreach_copy_([*us, *vs], [*new_us, *new_vs])
    return out


def _past_the_dispatcher(way: int, call: tuple[Any, ...], update: bool) -> list[Tensor]:
    """The same on tensors whose memory nobody else looks after: without views of what was found, or ops to copy it."""
    weights, us, vs, *_ = call
    if way == DIRECT:
        out = list(map(torch.empty_like, weights))
        not_finite = cpu.forward_and_finish(out, *call, update=update)
    else:
        out, found = op.forward.by(way, (*call, "cpu"))
        not_finite = cpu.finish(found, us, vs, update)
    if not_finite:
        place, sigma = not_finite
        raise NotFinite(place, sigma, f"weights[{place}]")
    return out


def _check_finite(sigmas: Tensor) -> None:
    for index, sigma in enumerate(sigmas.tolist()):
        if not math.isfinite(sigma):
            raise NotFinite(index, sigma, f"weights[{index}]")


@op.choices.serving
def _serving(
    backend: str | None, weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor],
    n_power_iterations: int, eps: float, update: bool, semantics: str,
) -> str:  # fmt: skip
    for name, tensors in (("weights", weights), ("us", us), ("vs", vs)):
        if not isinstance(tensors, (list, tuple)):
            raise TypeError(f"{name} must be a list of tensors, got {type(tensors).__name__}")
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}[{i}] must be a tensor, got {type(tensor).__name__}")
            if tensor.dtype not in op.DTYPES:
                raise TypeError(f"{name}[{i}] must be float32, float16, bfloat16 or float64, got {tensor.dtype}")
        if len(tensors) != len(weights):
            raise ValueError(f"{name} must be as many as weights, {len(weights)}, got {len(tensors)}")
    for i, (weight, u, v) in enumerate(zip(weights, us, vs)):
        if weight.dim() < 2:
            raise ValueError(f"weights[{i}] must have two dimensions or more, got shape {tuple(weight.shape)}")
        if weight.dtype != weights[0].dtype:
            raise TypeError(f"weights must have one dtype, got {weights[0].dtype} and, at {i}, {weight.dtype}")
        if weight.device != weights[0].device:
            raise ValueError(f"weights must be on one device, got {weights[0].device} and, at {i}, {weight.device}")
        for name, vector, length in (("us", u, weight.shape[0]), ("vs", v, math.prod(weight.shape[1:]))):
            if vector.shape != (length,):
                shapes = f"for weights[{i}] of shape {tuple(weight.shape)}, got {tuple(vector.shape)}"
                raise ValueError(f"{name}[{i}] must have shape ({length},) {shapes}")
            if vector.device != weight.device:
                raise ValueError(f"{name}[{i}] must be on {weight.device}, where its weight is, got {vector.device}")
    if not isinstance(n_power_iterations, int):
        raise TypeError(f"n_power_iterations must be an integer, got {type(n_power_iterations).__name__}")
    if n_power_iterations < 0:
        raise ValueError(f"n_power_iterations must not be negative, got {n_power_iterations}")
    if not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {eps}")
    if semantics not in op.SEMANTICS:
        raise ValueError(f"semantics must be 'torch' or 'biggan', got {semantics!r}")
    if update and n_power_iterations > 0:
        for name, vectors_of_it in (("us", us), ("vs", vs)):
            for i, vector in enumerate(vectors_of_it):
                if vector.stride(0) == 0 and len(vector) > 1:
                    raise ValueError(f"{name}[{i}] is written to and must not be expanded, got a stride of 0")
    if not weights:
        return "reference"
    options = {"n_power_iterations": n_power_iterations, "eps": eps, "update": update, "semantics": semantics}
    return op.choices.pick(weights[0].device, backend, weights, us, vs, **options)
