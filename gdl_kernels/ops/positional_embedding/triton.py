"""Token embeddings with sinusoidal positions on the GPU, in Triton.

Forward: a program owns some positions at some columns, computes their sinusoids once and adds them to the rows of each
sequence of the batch. Backward: the tokens' places are sorted by token, and a program owns a row of the table, whose
places it sums in their order: no atomics, the same bits every run. Places are also cut into chunks; one that is all of
one token, as padding's are, is summed beforehand by a program of its own, so that no program walks a long way.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _tuned
from ..._triton import capability, ceil_div, launch, power_of_two
from ..._tuned import Config
from .phases import phase_steps

#: How the kernels are launched where no table says otherwise; see ``tunable.py``. Up to ``chunk`` places a program
#: sums on the way to the next chunk, and on the way from the last. Not tuned yet.
CONFIGS: dict[str, Config] = {
    "forward": {"values": 16, "columns": 256, "programs": 8, "num_warps": 4},
    "backward": {"values": 16, "columns": 256, "chunk": 64, "num_warps": 4},
}


@triton.jit
def _cosine(phase):
    # Of an angle in 2^64ths of a turn, by its higher half. From the nearest whole turn it is at most half a turn away,
    # on which side is nothing to a cosine; and from a quarter turn, where the cosine is 0, at most another quarter.
    near = 1073741824 - tl.abs((phase >> 32).to(tl.int32))
    x = near.to(tl.float32) * (1.0 / 1073741824.0)
    u = x * x
    # sin(pi/2 x) = x + x p(x^2), with pi/2 - 1 and Chebyshev interpolation of the rest, off by 1e-10 before rounding. x
    # apart from its polynomial is rounded least.
    p = 1.603197613e-04 - 3.459223037e-06 * u
    p = -4.681710889e-03 + p * u
    p = 7.969262085e-02 + p * u
    p = -6.459640974e-01 + p * u
    p = 5.707963268e-01 + p * u
    return x + x * p


@triton.jit(do_not_specialize=["length", "batch", "start", "rows", "n_parts"])
def _forward(
    tokens, weight, steps, out, length, batch, start, rows, columns, stride, scale, n_tiles, n_parts,
    POSITIONS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) % n_parts
    tile = tl.program_id(0) // n_parts % n_tiles
    block = tl.program_id(0) // n_parts // n_tiles
    n = block.to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    step = tl.load(steps + column // 2, mask=column < columns, other=0)
    quarter = (1 - column % 2).to(tl.int64) << 62  # a sine is a cosine a quarter turn behind
    place = _cosine((n + start)[:, None] * step[None, :] - quarter[None, :])  # [POSITIONS, COLUMNS]
    there = (n < length)[:, None] & (column < columns)[None, :]
    for b in range(part, batch, n_parts):
        i = n + b * length.to(tl.int64)
        token = tl.load(tokens + i, mask=n < length, other=0).to(tl.int64)
        known = (token >= 0) & (token < rows)
        row = weight + tl.where(known, token, 0)[:, None] * stride + column[None, :]
        values = tl.load(row, mask=there & known[:, None], other=float("nan")).to(tl.float32)
        values = values * scale + place
        tl.store(out + i[:, None] * columns + column[None, :], values.to(out.dtype.element_ty), mask=there)


@triton.jit
def _sum_of_places(grad, stride, places, begin, end, column, columns, PLACES: tl.constexpr, COLUMNS: tl.constexpr):
    total = tl.zeros([PLACES, COLUMNS], tl.float32)
    for first in range(begin, end, PLACES):
        k = first + tl.arange(0, PLACES)
        place = tl.load(places + k, mask=k < end, other=0)
        there = (k < end)[:, None] & (column < columns)[None, :]
        total += tl.load(grad + place[:, None] * stride + column[None, :], mask=there, other=0.0).to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def _sum_chunks(
    grad, ids, places, sums, columns, stride, n_tiles, CHUNK: tl.constexpr, PLACES: tl.constexpr, COLUMNS: tl.constexpr
):
    # sums[chunk]: of a chunk that is all of one token.
    chunk = (tl.program_id(0) // n_tiles).to(tl.int64)
    column = tl.program_id(0) % n_tiles * COLUMNS + tl.arange(0, COLUMNS)
    begin = chunk * CHUNK
    if tl.load(ids + begin) == tl.load(ids + begin + CHUNK - 1):
        total = _sum_of_places(grad, stride, places, begin, begin + CHUNK, column, columns, PLACES, COLUMNS)
        tl.store(sums + chunk * columns + column, total, mask=column < columns)


@triton.jit
def _sum_rows(
    grad, places, splits, sums, grad_weight, columns, stride, scale, n_tiles,
    CHUNK: tl.constexpr, PLACES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // n_tiles).to(tl.int64)
    column = tl.program_id(0) % n_tiles * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = tl.load(splits + row), tl.load(splits + row + 1)
    # Up to the first chunk that begins here, chunk by chunk, and after the last that ends here.
    first = tl.minimum(tl.cdiv(begin, CHUNK) * CHUNK, end)
    last = tl.maximum(end // CHUNK * CHUNK, first)
    total = _sum_of_places(grad, stride, places, begin, first, column, columns, PLACES, COLUMNS)
    for chunk in range(first // CHUNK, last // CHUNK):
        total += tl.load(sums + chunk * columns + column, mask=column < columns, other=0.0)
    total += _sum_of_places(grad, stride, places, last, end, column, columns, PLACES, COLUMNS)
    values = (total * scale).to(grad_weight.dtype.element_ty)
    tl.store(grad_weight + row * columns + column, values, mask=column < columns)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # For the interpreter few, so that in tests a program has several sequences.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _contiguous_rows(matrix: Tensor) -> Tensor:
    """The matrix itself where its rows are contiguous, whatever lies between them; else a copy."""
    return matrix if matrix.stride()[1] == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _config(kernel: str, table: Tensor) -> tuple[Config, int, int, int]:
    """A configuration for tables or gradients with such rows: columns of a tile, tiles of a row, rows of a tile."""
    width = table.shape[-1]
    padded = power_of_two(width)
    key = padded, table.element_size()
    config = _tuned.configuration(capability(table.device), "positional_embedding", kernel, key, CONFIGS[kernel])
    columns = min(config["columns"], padded)
    return config, columns, ceil_div(width, columns), 32 * config["num_warps"] * config["values"] // columns


def forward(out: Tensor, tokens: Tensor, weight: Tensor, scale: float, start: int, backend: str) -> None:
    if tokens.numel() == 0:
        return
    ids, table, length = tokens.contiguous(), _contiguous_rows(weight), tokens.shape[-1]
    rows, width = weight.shape
    config, columns, tiles, positions = _config("forward", weight)
    positions = min(positions, power_of_two(length))
    programs, batch = ceil_div(length, positions) * tiles, tokens.numel() // length
    # With few positions the batch is split, too, and each part computes the sinusoids again.
    parts = min(batch, ceil_div(config["programs"] * _multiprocessors(weight.device), programs))
    steps = phase_steps(width, weight.device)
    launch(
        _forward, programs * parts, weight.device, ids, table, steps, out, length, batch, start, rows, width,
        table.stride(0), scale, tiles, parts, POSITIONS=positions, COLUMNS=columns,
        num_warps=config["num_warps"],
    )  # fmt: skip


def backward(
    grad_weight: Tensor, grad: Tensor, tokens: Tensor, num_embeddings: int, scale: float, backend: str
) -> None:
    width = grad.shape[-1]
    grads = _contiguous_rows(grad.reshape(-1, width))
    config, columns, tiles, rows = _config("backward", grads)
    chunk, num_warps = config["chunk"], config["num_warps"]
    # Tokens out of range come before the first row's or after the last's.
    ids, places = torch.sort(tokens.flatten().to(torch.int64), stable=True)
    splits = torch.searchsorted(ids, torch.arange(num_embeddings + 1, device=ids.device))
    chunks = ids.numel() // chunk
    sums = torch.empty(chunks, width, dtype=torch.float32, device=grad.device)
    constants = {"CHUNK": chunk, "PLACES": min(rows, chunk), "COLUMNS": columns, "num_warps": num_warps}
    stride = grads.stride(0)
    launch(_sum_chunks, chunks * tiles, grad.device, grads, ids, places, sums, width, stride, tiles, **constants)
    launch(
        _sum_rows, num_embeddings * tiles, grad.device, grads, places, splits, sums, grad_weight, width, stride, scale,
        tiles, **constants,
    )  # fmt: skip
