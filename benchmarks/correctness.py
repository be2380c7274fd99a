"""Is an output right? Asked of every contestant before it is timed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Outputs = Tensor | tuple[Tensor, ...]


def _errors(output: Tensor, truth: Tensor) -> tuple[float, float]:
    difference = output.double() - truth
    return difference.abs().max().item(), difference.square().mean().sqrt().item()


def error_share(outputs: Outputs, plain: Outputs, truth: Outputs) -> float:
    """The error of ``outputs`` as a share of what is allowed: twice that of ``plain`` plus two units in the last place.

    Both the largest and the root-mean-square error count: the first finds one wrong element, the second a wrong region
    whose values are small beside the largest ones. NaN counts as infinitely wrong.

    Raises:
        ValueError: if the number of outputs, or a shape or dtype, is not that of ``plain``.
    """
    shares = []
    for ours, theirs, right in matched(outputs, plain, truth):
        sizes = right.abs().max().item(), right.square().mean().sqrt().item()
        floor = 2 * torch.finfo(ours.dtype).eps  # for inputs on which plain PyTorch happens to be nearly exact
        for error, plain_error, size in zip(_errors(ours, right), _errors(theirs, right), sizes):
            allowed = 2 * plain_error + floor * size
            share = error / allowed if allowed else math.inf if error else 0.0
            shares.append(math.inf if math.isnan(share) else share)
    return max(shares)


def matched(outputs: Outputs, plain: Outputs, truth: Outputs) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each output with its like; a ValueError if their number, a shape or a dtype is not that of ``plain``."""
    given, expected, exact = map(tuple_of, (outputs, plain, truth))
    if len(given) != len(expected):
        raise ValueError(f"it gave {len(given)} outputs, must be {len(expected)}")
    triples = list(zip(given, expected, exact))
    for ours, theirs, right in triples:
        if ours.shape != right.shape or ours.dtype != theirs.dtype:
            raise ValueError(f"output is {ours.dtype} {tuple(ours.shape)}, must be {theirs.dtype} {tuple(right.shape)}")
    return triples


def tuple_of(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
