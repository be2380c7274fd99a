"""Runs on the matrix products that PyTorch carries, on any device: stacks of matrices, polynomials of Gram matrices.

Several steps of the iteration on a wide ``X`` are one: ``X_k = P X`` with P a polynomial of ``A = X X^T``. With
``B = a I + b A + c A^2`` a step is ``P <- B P``, ``A <- B A B``, all of them small, symmetric, functions of the one A.
So X is read twice in a round of steps, not in each. A round squares the condition number: small singular values of X
are known to it as squares. New rounds start from the X that the last one made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _matrices
from ..._arguments import sum_dtype
from ..._matrices import Group, symmetric_product
from .schedule import MARGIN, Step, cycle, finish, fixed, most_cycles

#: Steps in a round, and from what width beside the height rounds of more than one step are worth their small products.
ROUND = 3
WIDE = 2


class Round(NamedTuple):
    """What the gradient of one round needs.

    Attributes:
        x: before the round.
        gram: of x, scaled by the square of ``scale``.
        scale: ``[..., 1, 1]``, what brings singular values below 1; None in all rounds but the first.
    """

    x: Tensor
    gram: Tensor
    steps: list[Step]
    scale: Tensor | None


def forward(outputs: list[Tensor], weights: list[Tensor], steps: int | None, method: str, backend: str) -> None:
    orthogonal = [turned(output, weight) for output, weight in zip(outputs, weights)]
    for group, x, _, heights in _stacks(weights):
        group.store(_iterate(x, heights, method, steps, None), orthogonal)


def backward(
    grads: list[Tensor], grads_of_outputs: list[Tensor], weights: list[Tensor], steps: int | None, method: str,
    backend: str,
) -> None:  # fmt: skip
    """Go through the iteration again, and back: nothing but the weights is kept between the passes."""
    given = [turned(grad, weight) for grad, weight in zip(grads_of_outputs, weights)]
    filled = [turned(grad, weight) for grad, weight in zip(grads, weights)]
    for group, x, scale, heights in _stacks(weights):
        rounds: list[Round] = []
        _iterate(x, heights, method, steps, rounds)
        grad = group.load(given, x.dtype)
        while rounds:
            grad = _round_backward(grad, rounds.pop(), method)
        group.store(grad * scale, filled)


def turned(tensor: Tensor, weight: Tensor) -> Tensor:
    """The matrix of a tensor that belongs to a weight, turned to be at least as wide as high."""
    matrix = _matrices.flattened(tensor, weight)
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix


def _stacks(weights: Sequence[Tensor]) -> Iterator[tuple[Group, Tensor, Tensor, list[int]]]:
    """Each group, its matrices with a largest element of 1, what they were scaled by for that, and their heights."""
    matrices = [turned(weight, weight) for weight in weights]
    for group in _matrices.groups(matrices):
        x = group.load(matrices, sum_dtype(weights[0]))
        largest = torch.linalg.vector_norm(x, torch.inf, dim=(-2, -1), keepdim=True)
        if x.device.type == "cpu" and not largest.isfinite().all():
            _matrices.name_not_finite(weights, group.indices)
        scale = torch.where(largest > 0, largest, 1).reciprocal_()
        yield group, x * scale, scale, [matrices[i].shape[0] for i in group.indices]


def _iterate(x: Tensor, heights: list[int], method: str, steps: int | None, rounds: list[Round] | None) -> Tensor:
    """X with singular values brought to 1, of matrices ``heights`` high and padded from there."""
    gram = symmetric_product(x, x.mT)
    bound = _bound(gram)
    scale = (MARGIN[method] * torch.where(bound > 0, bound, 1).sqrt()).reciprocal_()
    gram *= scale.square()
    first: Tensor | None = scale

    def take(x: Tensor, gram: Tensor | None, steps: list[Step], length: int) -> Tensor:
        nonlocal first
        for start in range(0, len(steps), length):
            part = Round(x, symmetric_product(x, x.mT) if gram is None else gram, steps[start : start + length], first)
            if rounds is not None:
                rounds.append(part)
            x = _apply(part)
            gram = first = None
        return x

    length = ROUND if x.shape[-1] >= WIDE * x.shape[-2] else 1
    if steps is not None:
        # Bjorck's first steps are already accurate to the last place, which rounds would lose.
        return take(x, gram, fixed(method, steps), length if method == "polar" else 1)
    given: Tensor | None = gram
    for _ in range(most_cycles(method, x.dtype)):
        x = take(x, given, cycle(method), length)
        given = symmetric_product(x, x.mT)
        left = finish(method, _distance(given, heights), x.dtype)
        if left is not None:
            return take(x, given, left, 1)
    return x


def _bound(gram: Tensor) -> Tensor:
    """Of the largest eigenvalue, ``[..., 1, 1]``: the largest sum of a row. It is tight where rows are orthogonal."""
    return gram.abs().sum(-1, keepdim=True).amax(-2, keepdim=True)


def _distance(gram: Tensor, heights: list[int]) -> float:
    """The farthest of a stack from the identity, in Frobenius norm. Waits for the device."""
    difference = gram.clone()
    diagonal = difference.diagonal(dim1=-2, dim2=-1)
    # Rows of padding are 0 and stay so.
    ones = torch.arange(gram.shape[-1], device=gram.device) < torch.tensor(heights, device=gram.device)[:, None]
    diagonal.sub_(ones.view(diagonal.shape).to(gram.dtype))
    return torch.linalg.matrix_norm(difference).amax().item()


class Polynomial(NamedTuple):
    """One step of a round: the A that it starts from, its B, and P after it."""

    gram: Tensor
    step: Tensor
    product: Tensor


def _polynomials(gram: Tensor, steps: list[Step]) -> list[Polynomial]:
    taken: list[Polynomial] = []
    for a, b, c in steps:
        if taken:
            last = taken[-1]
            gram = symmetric_product(symmetric_product(last.step, last.gram), last.step)
        step = symmetric_product(gram, gram).mul_(c).add_(gram, alpha=b) if c else gram * b
        step.diagonal(dim1=-2, dim2=-1).add_(a)
        taken.append(Polynomial(gram, step, symmetric_product(step, taken[-1].product) if taken else step))
    return taken


def _apply(part: Round) -> Tensor:
    """``scale * P x``"""
    product = _polynomials(part.gram, part.steps)[-1].product
    return _times(product if part.scale is None else product * part.scale, part.x)


def _times(product: Tensor, x: Tensor) -> Tensor:
    """``product @ x`` with the diagonal apart: near 1 all else is a small correction, and is rounded as such."""
    diagonal = product.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    rest = product.clone()
    rest.diagonal(dim1=-2, dim2=-1).zero_()
    return (torch.addmm if x.dim() == 2 else torch.baddbmm)(diagonal * x, rest, x)


def _round_backward(grad: Tensor, part: Round, method: str) -> Tensor:
    """The gradient of x from that of ``scale * P x``."""
    x, gram, steps, scale = part
    taken = _polynomials(gram, steps)
    product = taken[-1].product
    grad_product = grad @ x.mT
    grad_x = _times(product, grad)
    grad_scale = None
    if scale is not None:
        grad_scale = (product * grad_product).sum((-2, -1), keepdim=True)
        grad_product = grad_product * scale
        grad_x = grad_x * scale
    grad_gram = None  # of the A after a step
    for k in reversed(range(len(steps))):
        (_, b, c), (before, step, _) = steps[k], taken[k]
        grad_step = grad_product @ taken[k - 1].product if k else grad_product
        grad_product = step @ grad_product
        if grad_gram is not None:  # A after = B A B
            product_before = step @ before
            grad_step = grad_step + grad_gram @ product_before + product_before.mT @ grad_gram
            grad_gram = step @ grad_gram @ step
        by_step = b * grad_step
        if c:
            by_step += c * (grad_step @ before + before @ grad_step)
        grad_gram = by_step if grad_gram is None else grad_gram + by_step
        grad_gram = (grad_gram + grad_gram.mT) / 2  # A is symmetric whatever x is
    assert grad_gram is not None
    if scale is not None and grad_scale is not None:
        grad_scale = grad_scale + 2 / scale * (gram * grad_gram).sum((-2, -1), keepdim=True)
        grad_gram = grad_gram * scale.square()
        # scale = 1 / (margin sqrt(bound)), and the bound is the sum of one row.
        sums = gram.abs().sum(-1, keepdim=True)
        bound, row = sums.max(-2, keepdim=True)
        bound = bound / scale.square()
        grad_bound = torch.where(bound > 0, grad_scale * scale / (-2 * torch.where(bound > 0, bound, 1)), 0)
        of_row = gram.gather(-2, row.expand(*row.shape[:-1], gram.shape[-1])).sign() * grad_bound
        grad_gram = grad_gram.scatter_add(-2, row.expand_as(of_row), of_row)
    return torch.add(grad_x, (grad_gram + grad_gram.mT) @ x)
