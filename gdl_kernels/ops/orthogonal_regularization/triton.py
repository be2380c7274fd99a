"""Orthogonal regularisation on the GPU: all weights of a list in a few launches.

``V`` is a weight turned to be at least as wide as high, ``G = V V^T``, as in ``cpu.py``. A program computes one tile of
one G, on or below the diagonal, and squares it in registers; where a gradient will be asked for it also writes it,
without the diagonal, to a packed list of tiles. The gradient's programs each own a tile of ``G V`` and walk a row of G,
the tiles above the diagonal being those below, transposed. What is subtracted for the larger Gram matrix, and the
diagonal, are sums of squares of rows and columns, from a kernel of their own.

What a program works on is in tables: a line for each weight, and one for each item of work. They depend on shapes
alone and stay on the device. Addresses change with every call, so a kernel that takes them as arguments writes them
into their table: no launch copies from the host, and calls can be captured in a CUDA graph once the tables are there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _matrices, _native, _tuned
from ..._triton import capability, ceil_div, launch
from ..._tuned import Config
from .cpu import orientation

#: Rows and columns of a tile of G, by bytes an element. Not tuned yet.
TILE = {4: 64, 2: 128}

#: Terms of a float32 product that are added one after another; then such sums are added, or a long one would lose a
#: digit. Products of 16 bits have no registers left for that.
SUMMED_AT_ONCE = tl.constexpr(1024)

#: Addresses that one launch writes to a table.
ADDRESSES = 16

#: Columns of the table of weights: height, width, stride, stride of the gradient, number of the first tile, place of
#: the norms, whether the penalty is of rows.
FIELDS = tl.constexpr(7)


@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["pointers"])
def _write_addresses(table, pointers, first):
    for i in tl.static_range(len(pointers)):
        tl.store(table + first + i, pointers[i].to(tl.int64))


@triton.jit
def _weight(addresses, table, weight, DTYPE: tl.constexpr, TURNED: tl.constexpr, ALIGNED: tl.constexpr):
    """Address, height, width and strides; number of its first tile, place of its norms, whether the penalty is of rows.

    ALIGNED numbers are 16 bytes. That they divide an address, a stride and the length of what lies in one piece is what
    lets the compiler load so many at a time.
    """
    line = table + weight * FIELDS
    base = tl.load(addresses + weight).to(tl.pointer_type(DTYPE))
    height, width = tl.load(line).to(tl.int32), tl.load(line + 1).to(tl.int32)
    stride, out_stride = tl.load(line + 2), tl.load(line + 3)
    if ALIGNED > 1:
        base = tl.multiple_of(base, 16)
        stride, out_stride = tl.multiple_of(stride, ALIGNED), tl.multiple_of(out_stride, ALIGNED)
        if TURNED:
            height = tl.multiple_of(height, ALIGNED)
        else:
            width = tl.multiple_of(width, ALIGNED)
    return base, height, width, stride, out_stride, tl.load(line + 4), tl.load(line + 5), tl.load(line + 6)


@triton.jit
def _load(base, rows, columns, stride, height, width, TURNED: tl.constexpr):
    """A tile of V, [rows, columns]. Next to each other in memory are numbers of a row, in a turned V of a column."""
    if TURNED:
        inside = (columns < width)[:, None] & (rows < height)[None, :]
        tile = tl.trans(tl.load(base + columns.to(tl.int64)[:, None] * stride + rows[None, :], mask=inside, other=0.0))
    else:
        inside = (rows < height)[:, None] & (columns < width)[None, :]
        tile = tl.load(base + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def _product(
    base, rows, columns, stride, height, width, first, until, TURNED: tl.constexpr, T: tl.constexpr, STEP: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Of rows and rows of V, over some of its columns.
    tile = tl.zeros([T, T], tl.float32)
    for start in range(first, until, STEP):
        steps = (start + tl.arange(0, STEP)).to(tl.int32)
        left = _load(base, rows, steps, stride, height, width, TURNED)
        right = _load(base, columns, steps, stride, height, width, TURNED)
        tile = tl.dot(left.to(DOT), tl.trans(right.to(DOT)), tile, input_precision=PRECISION)
    return tile


@triton.jit(do_not_specialize_on_alignment=["partials"])
def _gram(
    addresses, table, items, partials, tiles,
    KEEP: tl.constexpr, TURNED: tl.constexpr, ALIGNED: tl.constexpr, T: tl.constexpr, STEP: tl.constexpr,
    DTYPE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    weight, i, j = tl.load(items + 3 * item), tl.load(items + 3 * item + 1), tl.load(items + 3 * item + 2)
    base, height, width, stride, _, first_tile, _, of_rows = _weight(addresses, table, weight, DTYPE, TURNED, ALIGNED)
    inner = tl.arange(0, T)
    rows, columns = (i * T + inner).to(tl.int32), (j * T + inner).to(tl.int32)
    tile = tl.zeros([T, T], tl.float32)
    if DTYPE.primitive_bitwidth == 32:
        for first in range(0, width, SUMMED_AT_ONCE):
            until = tl.minimum(first + SUMMED_AT_ONCE, width)
            tile += _product(base, rows, columns, stride, height, width, first, until, TURNED, T, STEP, DOT, PRECISION)
    else:
        tile = _product(base, rows, columns, stride, height, width, 0, width, TURNED, T, STEP, DOT, PRECISION)
    off = rows[:, None] != columns[None, :]
    counted = tl.where(off | (of_rows == 0), tile, 0.0)
    total = tl.sum(counted * counted)
    tl.store(partials + item, tl.where(i == j, total, 2 * total))
    if KEEP:
        place = tiles + (first_tile + i * (i + 1) // 2 + j) * T * T
        tl.store(place + inner[:, None] * T + inner[None, :], tl.where(off, tile, 0.0))


@triton.jit(do_not_specialize_on_alignment=["partials"])
def _norms(
    addresses, table, items, partials, norms,
    TURNED: tl.constexpr, ALIGNED: tl.constexpr, SUMMED: tl.constexpr, STEP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    weight, of_columns, block = tl.load(items + 3 * item), tl.load(items + 3 * item + 1), tl.load(items + 3 * item + 2)
    base, height, width, stride, _, _, place, _ = _weight(addresses, table, weight, DTYPE, TURNED, ALIGNED)
    own = (block * SUMMED + tl.arange(0, SUMMED)).to(tl.int32)
    sums = tl.zeros([SUMMED], tl.float32)
    if of_columns != 0:
        for start in range(0, height, STEP):
            rows = (start + tl.arange(0, STEP)).to(tl.int32)
            v = _load(base, rows, own, stride, height, width, TURNED).to(tl.float32)
            sums += tl.sum(v * v, 0)
        tl.store(norms + place + height + own, sums, mask=own < width)
        tl.store(partials + item, -tl.sum(sums * sums, 0))
    else:
        for start in range(0, width, STEP):
            columns = (start + tl.arange(0, STEP)).to(tl.int32)
            v = _load(base, own, columns, stride, height, width, TURNED).to(tl.float32)
            sums += tl.sum(v * v, 1)
        tl.store(norms + place + own, sums, mask=own < height)
        tl.store(partials + item, 0.0)


@triton.jit
def _gradient(
    addresses, out_addresses, table, items, tiles, norms, grad, beta,
    COLUMNS: tl.constexpr, TURNED: tl.constexpr, ALIGNED: tl.constexpr, T: tl.constexpr, STEP: tl.constexpr,
    DTYPE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    weight, i, block = tl.load(items + 3 * item), tl.load(items + 3 * item + 1), tl.load(items + 3 * item + 2)
    base, height, width, stride, out_stride, first_tile, place, of_rows = _weight(
        addresses, table, weight, DTYPE, TURNED, ALIGNED
    )
    inner = tl.arange(0, T)
    rows = (i * T + inner).to(tl.int32)
    columns = (block * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int32)
    acc = tl.zeros([T, COLUMNS], tl.float32)
    # STEP rows of V at a time, which are STEP columns of a tile left of the diagonal,
    for start in range(0, (i + 1) * T, STEP):
        j, part = start // T, start % T
        steps = (start + tl.arange(0, STEP)).to(tl.int32)
        tile = tiles + (first_tile + i * (i + 1) // 2 + j) * T * T
        s = tl.load(tile + inner[:, None] * T + part + tl.arange(0, STEP)[None, :])  # [T, STEP]
        v = _load(base, steps, columns, stride, height, width, TURNED)
        acc = tl.dot(s.to(DOT), v.to(DOT), acc, input_precision=PRECISION)
    # and STEP rows of one below it, transposed.
    for start in range((i + 1) * T, height, STEP):
        j, part = start // T, start % T
        steps = (start + tl.arange(0, STEP)).to(tl.int32)
        tile = tiles + (first_tile + j * (j + 1) // 2 + i) * T * T
        s = tl.load(tile + (part + tl.arange(0, STEP))[:, None] * T + inner[None, :])  # [STEP, T]
        v = _load(base, steps, columns, stride, height, width, TURNED)
        acc = tl.dot(tl.trans(s).to(DOT), v.to(DOT), acc, input_precision=PRECISION)
    if of_rows == 0:
        of_row = tl.load(norms + place + rows, mask=rows < height, other=0.0)
        of_column = tl.load(norms + place + height + columns, mask=columns < width, other=0.0)
        v = _load(base, rows, columns, stride, height, width, TURNED).to(tl.float32)
        acc += v * (of_row[:, None] - of_column[None, :])
    acc *= 4 * beta * tl.load(grad)
    out = tl.load(out_addresses + weight).to(tl.pointer_type(DTYPE))
    if ALIGNED > 1:
        out = tl.multiple_of(out, 16)
    if TURNED:
        inside = (columns < width)[:, None] & (rows < height)[None, :]
        places = out + columns.to(tl.int64)[:, None] * out_stride + rows[None, :]
        tl.store(places, tl.trans(acc).to(DTYPE), mask=inside)
    else:
        inside = (rows < height)[:, None] & (columns < width)[None, :]
        tl.store(out + rows.to(tl.int64)[:, None] * out_stride + columns[None, :], acc.to(DTYPE), mask=inside)


class Matrix(NamedTuple):
    """What the tables say of a weight.

    Attributes:
        height, width: of V.
        stride, out_stride: in a weight's matrix, and in its gradient's, from row to row. Rows are in one piece.
        turned: whether V is the transpose.
        of_rows: whether the penalty is of the rows of V.
        aligned: whether tiles can be loaded and stored 16 bytes at a time.
    """

    height: int
    width: int
    stride: int
    out_stride: int
    turned: bool
    of_rows: bool
    aligned: bool


class Part(NamedTuple):
    """Weights of one kind, which go through one launch of each kernel: their tables of work, ``int32 [items, 3]``."""

    turned: bool
    aligned: bool
    gram: Tensor
    norms: Tensor
    gradient: Tensor


class Plan(NamedTuple):
    """The work on a list of weights.

    Attributes:
        table: int64, a line for each weight.
        n_tiles, n_norms: sizes of what is kept.
    """

    table: Tensor
    parts: list[Part]
    n_tiles: int
    n_norms: int


def _built_in(kernel: str, aligned: bool, size: int) -> Config:
    """How a kernel is launched where no table says otherwise. Chosen by what the compiler reports, not tuned on any
    GPU. Numbers that are loaded one by one go through registers: half as many at a time, or they would spill; and
    those that are stored so have an address each.
    """
    num_warps, step, columns = (4, 32, 64) if size == 4 else (8, 64, 128)
    if not aligned:
        step, columns = step // 2, columns // 2
    if kernel == "norms":
        return {"summed": 64, "values": 16 if aligned else 8, "num_warps": num_warps}
    multiplied = {"step": step, "num_stages": 3, "num_warps": num_warps}
    return {**multiplied, "num_warps": 8} if kernel == "gram" else {"columns": columns, **multiplied}


def _config(kernel: str, aligned: bool, size: int, device: torch.device) -> Config:
    built_in, key = _built_in(kernel, aligned, size), (int(aligned), size)
    return _tuned.configuration(capability(device), "orthogonal_regularization", kernel, key, built_in)


#: Kernel, whether for aligned weights, and how many rows or columns a program owns.
Cut = tuple[str, bool, int]


@functools.lru_cache(maxsize=64)
def _plan(matrices: tuple[Matrix, ...], tile: int, cuts: tuple[Cut, ...], device: torch.device) -> Plan:
    """The work of the kernels that ``cuts`` has."""
    sizes = {(kernel, aligned): size for kernel, aligned, size in cuts}
    table, n_tiles, n_norms = [], 0, 0
    work: dict[tuple[bool, bool], tuple[list[Any], list[Any], list[Any]]] = {}
    for w, matrix in enumerate(matrices):
        n_rows = ceil_div(matrix.height, tile)
        summed, columns = (sizes.get((kernel, matrix.aligned)) for kernel in ("norms", "gradient"))
        table.append([
            matrix.height, matrix.width, matrix.stride, matrix.out_stride, n_tiles, n_norms, int(matrix.of_rows)
        ])  # fmt: skip
        gram, norms, gradient = work.setdefault((matrix.turned, matrix.aligned), ([], [], []))
        if matrix.width and ("gram", matrix.aligned) in sizes:
            gram += [(matrix.width, w, i, j) for i in range(n_rows) for j in range(i + 1)]
        if matrix.width and columns:
            n_columns = ceil_div(matrix.width, columns)
            gradient += [(matrix.height, w, i, k) for k in range(n_columns) for i in range(n_rows)]
        if matrix.width and not matrix.of_rows:
            if summed:
                norms += [(matrix.width, w, 0, b) for b in range(ceil_div(matrix.height, summed))]
                norms += [(matrix.height, w, 1, b) for b in range(ceil_div(matrix.width, summed))]
            n_norms += matrix.height + matrix.width
        n_tiles += n_rows * (n_rows + 1) // 2

    def items(lines: list[Any]) -> Tensor:
        # The longest first: the GPU starts programs in order, and short ones fill what is left at the end.
        ordered = [line[1:] for line in sorted(lines, key=lambda line: -line[0])]
        return torch.tensor(ordered, dtype=torch.int32, device=device).view(-1, 3)

    parts = [Part(*kind, *map(items, lists)) for kind, lists in work.items()]
    return Plan(torch.tensor(table, dtype=torch.int64, device=device), parts, n_tiles, n_norms)


#: What each dtype is multiplied in: products of G and V in float32's range, which those of float16 may leave. Triton's
#: interpreter can't multiply bfloat16; in float32 it computes the same but for the rounding of G.
_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_DOT = _DTYPES | ({torch.bfloat16: tl.float32} if _native.interpreting() else {})
_DOT_OF_GRAM = _DOT | {torch.float16: tl.float32}


@functools.lru_cache(maxsize=1024)
def _line(sizes: tuple[int, ...], stride: int, columns: bool, itemsize: int, aligned: bool) -> Matrix:
    """What the tables say of a weight of given sizes, whose memory begins at 16 bytes or not."""
    rows, out_stride = sizes[0], math.prod(sizes[1:])
    turn, of_rows = orientation(rows, out_stride, columns)
    height, width = (out_stride, rows) if turn else (rows, out_stride)
    # The gradient's rows are in one piece from the first to the last: their length is its stride.
    aligned = aligned and stride * itemsize % 16 == 0 and out_stride * itemsize % 16 == 0
    return Matrix(height, width, stride, out_stride, turn, of_rows, aligned)


class Call:
    """A list of weights as some of the kernels take it."""

    def __init__(self, weights: Sequence[Tensor], columns: bool, kernels: Sequence[str]) -> None:
        self.device, self.dtype = weights[0].device, weights[0].dtype
        self.tile = TILE[self.dtype.itemsize]
        self.matrices, lines = [], []
        for weight in weights:
            # Nothing else is asked of a weight than where it is and how its rows follow each other.
            matrix, stride = weight, math.prod(weight.shape[1:])
            if not weight.is_contiguous():
                matrix = _matrices.flattened(weight)
                if matrix.stride(1) != 1 and matrix.shape[1] != 1:
                    matrix = matrix.contiguous()
                stride = matrix.stride(0)
            self.matrices.append(matrix)
            lines.append(_line(matrix.shape, stride, columns, self.dtype.itemsize, matrix.data_ptr() % 16 == 0))
        self.configs = {
            (kernel, aligned): _config(kernel, aligned, self.dtype.itemsize, self.device)
            for kernel in kernels
            for aligned in {line.aligned for line in lines if kernel != "norms" or not line.of_rows}
        }
        owned = {"norms": "summed", "gradient": "columns"}
        cuts = tuple(
            (kernel, aligned, config[owned[kernel]] if kernel in owned else self.tile)
            for (kernel, aligned), config in self.configs.items()
        )
        self.plan = _plan(tuple(lines), self.tile, cuts, self.device)

    def addresses(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensors' addresses, on the device: the last is written again to fill the last launch."""
        size = ceil_div(len(tensors), ADDRESSES) * ADDRESSES
        table = torch.empty(size, dtype=torch.int64, device=self.device)
        filled = *tensors, *[tensors[-1]] * (size - len(tensors))
        for first in range(0, size, ADDRESSES):
            some = filled[first : first + ADDRESSES]
            launch(_write_addresses, 1, self.device, table, some, first, num_warps=1)
        return table

    def launch(self, kernel: Any, items: Tensor, part: Part, *args: Any, **constants: Any) -> None:
        if len(items):
            together = 16 // self.dtype.itemsize if part.aligned else 1
            launch(
                kernel, len(items), self.device, *args, **constants, TURNED=part.turned, ALIGNED=together,
                DTYPE=_DTYPES[self.dtype],
            )  # fmt: skip

    def products(self, kernel: str, part: Part) -> dict[str, Any]:
        """How a kernel multiplies: float32 as torch does, G with float16 weights in TF32."""
        config = self.configs[kernel, part.aligned]
        precision = "ieee" if self.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32 else "tf32"
        dot = _DOT if kernel == "gram" else _DOT_OF_GRAM
        return {
            "T": self.tile, "DOT": dot[self.dtype], "PRECISION": precision, "STEP": config["step"],
            "num_stages": config["num_stages"], "num_warps": config["num_warps"],
        }  # fmt: skip


def kept_sizes(weights: Sequence[Tensor], columns: bool) -> tuple[int, int]:
    """Elements of the packed tiles of all G, and of the norms that go with them."""
    tile = TILE[weights[0].dtype.itemsize]
    n_tiles = n_norms = 0
    for weight in weights:
        rows, size = weight.shape[0], math.prod(weight.shape[1:])
        _, of_rows = orientation(rows, size, columns)
        n_rows = ceil_div(min(rows, size), tile)
        n_tiles += n_rows * (n_rows + 1) // 2
        n_norms += 0 if of_rows else rows + size
    return n_tiles * tile * tile, n_norms


def forward(
    outputs: tuple[Tensor, list[Tensor]], weights: list[Tensor], beta: float, columns: bool, keep: bool, backend: str
) -> None:
    penalty, kept = outputs
    call = Call(weights, columns, ("gram", "norms"))
    tiles, norms = kept if keep else (penalty, penalty.new_empty(call.plan.n_norms))
    addresses = call.addresses(call.matrices)
    count = sum(len(part.gram) + len(part.norms) for part in call.plan.parts)
    partials, first = torch.empty(count, dtype=torch.float32, device=call.device), 0
    for part in call.plan.parts:
        call.launch(
            _gram, part.gram, part, addresses, call.plan.table, part.gram, partials[first:], tiles,
            KEEP=keep, **call.products("gram", part),
        )  # fmt: skip
        first += len(part.gram)
        if len(part.norms):
            config = call.configs["norms", part.aligned]
            step = 32 * config["num_warps"] * config["values"] // config["summed"]
            call.launch(
                _norms, part.norms, part, addresses, call.plan.table, part.norms, partials[first:], norms,
                SUMMED=config["summed"], STEP=step, num_warps=config["num_warps"],
            )  # fmt: skip
        first += len(part.norms)
    penalty.copy_(beta * partials.sum(dtype=torch.float64).clamp(min=0))


def backward(
    grads: list[Tensor],
    grad: Tensor,
    weights: list[Tensor],
    kept: list[Tensor],
    beta: float,
    columns: bool,
    backend: str,
) -> None:
    call = Call(weights, columns, ("gradient",))
    addresses, out_addresses = call.addresses(call.matrices), call.addresses(grads)
    for part in call.plan.parts:
        call.launch(
            _gradient, part.gradient, part, addresses, out_addresses, call.plan.table, part.gradient, *kept, grad,
            beta, COLUMNS=call.configs["gradient", part.aligned]["columns"], **call.products("gradient", part),
        )  # fmt: skip
