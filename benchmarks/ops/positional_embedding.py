"""Token embeddings with sinusoidal positions, against torch's embedding and a table of sinusoids."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import gdl_kernels
from gdl_kernels.ops.positional_embedding import reference

from ..cases import COMPILED, EAGER, OURS, Case, Deferred, Inputs, Task, dtypes, short
from ..ceilings import memory_copy
from ..images import BACKWARD, FORWARD, ROTATED_BYTES, TRAINING, compiles, copies, is_of, over
from ..passes import Passes
from ..results import Bar, Result

COMPUTED = "eager, computed"


class Size(NamedTuple):
    """Sequences of so many positions, over a table of so many rows."""

    name: str
    batch: int
    length: int
    rows: int
    columns: int = 512


SIZES = (
    Size("Transformer", 32, 512, 37_000),
    Size("MuseNet", 1, 4096, 1122),
    Size("65,536 positions", 1, 65_536, 1122),
)


def cases(device: torch.device, quick: bool) -> Iterator[Deferred]:
    for passes in (FORWARD, TRAINING) if quick else (FORWARD, BACKWARD, TRAINING):
        for dtype in dtypes(device, quick):
            for size in SIZES[1:2] if quick else SIZES:
                built = functools.partial(case, size, dtype, device, passes, quick=quick)
                yield Deferred(_name(size, dtype, passes), built)


def _name(size: Size, dtype: torch.dtype, passes: Passes) -> str:
    return f"{passes.name}, {size.name}, {short(dtype)}"


def case(size: Size, dtype: torch.dtype, device: torch.device, passes: Passes, *, quick: bool = False) -> Case:
    """The rival's sinusoids are a table, as most models have them, and computed where the name says so. It scales and
    adds in one pass. The backward pass alone has no compiled rival: compiled code forbids a second walk through its
    graph, and has torch's own embedding backward in it.
    """
    scale = math.sqrt(size.columns)
    sinusoids = reference.sinusoids(0, size.length, size.columns, device).to(dtype)

    def cached(tokens: Tensor, weight: Tensor) -> Tensor:
        return torch.add(sinusoids, F.embedding(tokens, weight), alpha=scale)

    computed = functools.partial(reference.positional_embedding, scale=scale, start=0)
    contestants = [passes.contestant(EAGER, cached)]
    if passes.forward:
        contestants.append(passes.contestant(COMPUTED, computed))
    if compiles(passes, quick):
        contestants.append(passes.contestant(COMPILED, torch.compile(cached, dynamic=False)))
    ours = passes.contestant(OURS, gdl_kernels.positional_embedding)
    contestants.append(replace(ours, explain=lambda *inputs: gdl_kernels.explain("positional_embedding", *inputs[:2])))
    tokens, function = size.batch * size.length, passes.of(computed)
    output, table = (rows * size.columns * dtype.itemsize for rows in (tokens, size.rows))
    # Forward: a row is read and one written for each token. Backward: one is read, and the table's gradient written.
    moved = passes.forward * (2 * output + 8 * tokens) + passes.backward * (output + table + 8 * tokens)
    # Forward: an element is scaled, and its sinusoid added. Backward: its gradient is scaled, and added to its row's.
    operations = 2 * (passes.forward + passes.backward) * tokens * size.columns
    input_sets = max(2, math.ceil(ROTATED_BYTES / output))
    return Case(
        name=_name(size, dtype, passes),
        shape=f"B{size.batch} N{size.length} D{size.columns} V{size.rows}: {output / 1e6:.3g} MB out",
        dtype=dtype,
        device=device,
        inputs=functools.partial(_inputs, size, dtype, passes.backward),
        task=Task(function, function, flops=operations, bytes=moved),
        contestants=contestants,
        ceiling=memory_copy(output, input_sets),
        input_sets=input_sets,
    )


def _inputs(size: Size, dtype: torch.dtype, backward: bool, generator: torch.Generator) -> Inputs:
    device = generator.device
    # Few tokens make up most of a text, as words do by Zipf's law.
    chances = 1 / torch.arange(1, size.rows + 1, device=device, dtype=torch.float32)
    tokens = torch.multinomial(chances, size.batch * size.length, replacement=True, generator=generator)
    tokens = torch.randperm(size.rows, generator=generator, device=device)[tokens].view(size.batch, size.length)
    weight = torch.randn(size.rows, size.columns, generator=generator, device=device, dtype=dtype)
    if not backward:
        return tokens, weight
    grad = torch.randn(*tokens.shape, size.columns, generator=generator, device=device, dtype=dtype)
    return tokens, weight, grad


def bars(results: Sequence[Result]) -> list[Bar]:
    asked = []
    for result in results:
        if is_of(result, FORWARD):
            asked += [over(result, COMPILED, 1.0), copies(result, 1.5)]
        else:
            asked.append(over(result, EAGER, 1.0))
    return asked
