"""Self-attention of a minibatch at the shapes of SAGAN and BigGAN, key and value max-pooled inside."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

import gdl_kernels

from ..cases import EAGER, Case, Task, dtypes
from ..ceilings import matrix_product
from ..images import (
    BATCHES,
    FORWARD,
    QUICK_BATCHES,
    QUICK_SIDES,
    SIDES,
    TRAINING,
    ImageOp,
    case,
    grown,
    is_of,
    over,
)  # fmt: skip
from ..passes import Passes
from ..results import Bar, Result
from ..sdpa import by_kernel

SDPA = "SDPA"


def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As public implementations write it."""
    key, value = F.max_pool2d(key, 2), F.max_pool2d(value, 2)
    weights = torch.bmm(query.flatten(2).transpose(1, 2), key.flatten(2)).softmax(-1)
    out = torch.bmm(value.flatten(2), weights.transpose(1, 2))
    return out.view(*value.shape[:2], *query.shape[2:])


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Its fast kernels want pixels by channels, contiguous, under a head."""
    key, value = F.max_pool2d(key, 2), F.max_pool2d(value, 2)
    q, k, v = (t.flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for t in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    return out.squeeze(1).transpose(1, 2).reshape(*value.shape[:2], *query.shape[2:])


CALL = functools.partial(gdl_kernels.minibatch_self_attention, pool=2)
EXPLAIN = functools.partial(gdl_kernels.explain, "minibatch_self_attention", pool=2)
#: Its operations are those of its products, which are counted below.
OP = ImageOp("minibatch_self_attention", CALL, eager, operations=(0, 0), explain=EXPLAIN)

#: Batch, channels of query and of value, size of the map. A map of all pairs of the last is 256 MB in float32.
SIZES = {
    "SAGAN G": (8, 32, 128, 32),
    "SAGAN D": (8, 16, 64, 32),
    "BigGAN-128 D": (4, 12, 48, 64),
    "BigGAN-128 G": (4, 24, 96, 64),
    "BigGAN-256 G": (1, 24, 96, 128),
}


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for name, size in SIZES.items():
        if quick and name != ("BigGAN-128 G" if device.type == "cuda" else "SAGAN G"):
            continue
        for dtype in dtypes(device, quick):
            for passes in (FORWARD, TRAINING):
                yield attention_case(name, size, dtype, device, passes, quick=quick)
    _, channels, value_channels, side = SIZES["SAGAN G"]
    for batch in QUICK_BATCHES if quick else BATCHES:
        yield grown(_point((batch, channels, value_channels, side), device), "batch", batch)
    for side in (QUICK_SIDES if quick else SIDES)[:-1]:  # eager PyTorch's map grows with the square of the pixels
        yield grown(_point((1, channels, value_channels, side), device), "pixels", side**2)


def _point(size: tuple[int, int, int, int], device: torch.device) -> Case:
    return attention_case("SAGAN's channels", size, torch.float32, device, FORWARD, quick=True)


def attention_case(
    name: str, size: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, passes: Passes, *, quick: bool
) -> Case:
    batch, channels, value_channels, side = size
    shapes = [(batch, c, side, side) for c in (channels, channels, value_channels)]
    op = replace(OP, added_channels=value_channels - channels)
    made = case(op, shapes, dtype, device, passes, quick=quick)
    pairs = batch * side**2 * (side // 2) ** 2
    # Forward two products, scores and output; backward scores again, and four gradients: of weights and values as long
    # as values are, of queries and keys as long as those are.
    products = passes.forward * (channels + value_channels) + passes.backward * (3 * channels + 2 * value_channels)
    task = made.task
    *others, ours = made.contestants
    kernels = [passes.contestant(*rival) for rival in by_kernel(SDPA, sdpa, device)]
    return replace(
        made,
        name=f"{passes.name}, {made.name.split(', ', 1)[1]}, {name}",
        task=Task(task.truth, task.plain, flops=2.0 * pairs * products, bytes=task.bytes),
        contestants=[*others, *(kernels[:1] if quick else kernels), ours],
        ceiling=matrix_product,
    )


def bars(results: Sequence[Result]) -> list[Bar]:
    asked = []
    for result in results:
        if is_of(result, FORWARD) or is_of(result, TRAINING):
            asked.append(over(result, EAGER, 3.0))
        if is_of(result, FORWARD):
            asked.append(over(result, SDPA, 1.5))
    return asked
