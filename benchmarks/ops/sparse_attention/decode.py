"""Decoding: one token's query over a cache of keys and values, against reading what it keeps once."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...cases import Case, Contestant, Deferred, Inputs, Task, dtypes, short
from ...ceilings import memory_read
from ...results import Bar, Result, curve, exponent
from ...sdpa import by_kernel
from .attention import in_chunks
from .patterns import Pattern, causal, fixed, local
from .problem import ours

CACHED = 16_384
#: What the calls' kept keys and values come to in all: more than the caches hold. A model's other layers would have
#: driven them out as well.
ROTATED_BYTES = 64e6
#: Pattern and block size; of `fixed` one that holds a run's summary and nothing else.
LOCAL, FIXED, DENSE = (local(1024), 128), (fixed(128, 32), 32), (causal(), 128)
LOCAL_GROWTH, FIXED_GROWTH = "decode, local over keys cached", "decode, fixed over keys kept"


@dataclass(frozen=True)
class Step:
    """One token of each sample, at the end of its cache."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        heads = f"H{self.heads}" if self.heads == self.kv_heads else f"H{self.heads}/{self.kv_heads}"
        return f"B{self.batch} {heads} d{self.head_dim}"


ONE = Step(1, 8, 8, 64)
STEPS = (ONE, Step(1, 8, 8, 128), Step(8, 8, 8, 64), Step(1, 32, 8, 64))


def cases(device: torch.device, quick: bool) -> Iterator[Deferred]:
    for step in STEPS[:1] if quick else STEPS:
        for pattern, block_size in (DENSE, LOCAL, FIXED):
            for dtype in dtypes(device, quick):
                yield case(pattern, block_size, step, CACHED, dtype, device)


def growth_cases(device: torch.device, quick: bool) -> Iterator[Deferred]:
    for name, (pattern, block_size) in ((LOCAL_GROWTH, LOCAL), (FIXED_GROWTH, FIXED)):
        for cached in (4096, 16_384) if quick else (4096, 8192, 16_384, 32_768, 65_536):
            point = case(pattern, block_size, ONE, cached, torch.float32, device)
            yield Deferred(f"growth, {point.name}", functools.partial(_grown, name, pattern, cached, point))


def _grown(curve: str, pattern: Pattern, cached: int, point: Deferred) -> Case:
    built = point.build()
    # Time should follow what is kept: of `local` the same at any length, of `fixed` a quarter.
    size = cached if curve == LOCAL_GROWTH else len(pattern.kept_keys(cached, built.device))
    return replace(built, name=f"growth, {built.name}", contestants=built.contestants[-1:], growth=(curve, size))


def case(
    pattern: Pattern, block_size: int, step: Step, cached: int, dtype: torch.dtype, device: torch.device
) -> Deferred:
    name = f"decode, {pattern.name}, {cached} cached, {step}, {short(dtype)}"
    return Deferred(name, lambda: _case(name, pattern, block_size, step, cached, dtype, device))


def _case(
    name: str, pattern: Pattern, block_size: int, step: Step, cached: int, dtype: torch.dtype, device: torch.device
) -> Case:
    kept = pattern.kept_keys(cached, device)
    layout = pattern.layout(cached, block_size).to(device)
    plain = in_chunks(pattern.keep, torch.tensor([cached - 1], device=device))
    work = step.batch * len(kept) * step.head_dim
    kept_bytes = 2 * work * step.kv_heads * dtype.itemsize
    input_sets = max(3, math.ceil(ROTATED_BYTES / kept_bytes))
    return Case(
        name=name,
        shape=f"{step}, {cached} keys cached, {len(kept)} kept, blocks of {block_size}; {input_sets} caches in turn",
        dtype=dtype,
        device=device,
        inputs=functools.partial(_inputs, step, cached, dtype),
        task=Task(plain, plain, flops=4 * work * step.heads, bytes=kept_bytes),
        contestants=[*_sdpa(kept, cached, step), ours(layout, query_start=cached - 1)],
        ceiling=memory_read(kept_bytes, input_sets),
        input_sets=input_sets,
    )


def bars(results: Sequence[Result]) -> list[Bar]:
    asked = []
    for result in results:
        if result.case.startswith("decode,"):
            share = result.share_of_ceiling(result.ours)
            claim = f"{result.case}: time over reading what is kept"
            asked.append(Bar(claim, 1.5, None if share is None else 1 / share, at_most=True))
    for name, limit in ((LOCAL_GROWTH, 0.1), (FIXED_GROWTH, 1.1)):
        points = curve(results, name)
        if points:
            time = exponent((n, row.median_ms) for n, result in points if (row := result.ours))
            what, _, size = name.partition(" over ")
            asked.append(Bar(f"{what}: time grows as {size} to the power", limit, time, "", at_most=True))
    return asked


def _sdpa(kept: Tensor, cached: int, step: Step) -> list[Contestant]:
    """torch's attention over the kept keys alone: a view where they are the last ones, else gathered in every call."""
    last = kept[0] == cached - len(kept)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = (t[:, :, kept[0] :] if last else t.index_select(2, kept) for t in (key, value))
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=step.heads != step.kv_heads)

    return [Contestant(*rival) for rival in by_kernel("SDPA, kept keys", attention, kept.device)]


def _inputs(step: Step, cached: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    shapes = [(step.batch, step.heads, 1, step.head_dim)] + [(step.batch, step.kv_heads, cached, step.head_dim)] * 2
    return tuple(torch.randn(shape, generator=generator, device=generator.device, dtype=dtype) for shape in shapes)
