"""Launches the Triton kernels: a few launches for all matrices, whatever their number."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .... import _tuned
from ...._triton import capability, ceil_div, launch
from ...._tuned import Config
from .. import vectors
from . import kernels
from .matrices import Matrix, laid_out_like, matrix

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

#: By bytes an element, how each kernel is launched where no table says otherwise; see ``tunable.py``. Four rows of
#: 13,824 columns in float32 are 221 KB, and 29 MB in all 132 programs of an H100: its L2 has 50 MB. Each thread loads
#: 16 bytes at a time, from four rows. Not tuned yet.
CONFIGS: dict[int, dict[str, Config]] = {
    size: {
        "wide_products": {"rows": 4, "values": 64 // size, "num_warps": 2 * size},
        "narrow_products": {"rows": 32, "values": 32 // size, "num_warps": 2 * size},
        "merge": {"strip": 128, "values": 16, "num_warps": 4},
        "finish": {"values": 4, "num_warps": 8},
        "divide": {"values": 8, "piece": 16384, "num_warps": 8},
        "gradients": {"values": 8, "piece": 16384, "num_warps": 8},
    }
    for size in (2, 4)
}

#: The most columns of a narrow matrix.
NARROW = 256

#: (outer, rows, inner) of each matrix.
Shapes = tuple[tuple[int, int, int], ...]


class Work(NamedTuple):
    """What the programs of a list of shapes do: int64 tables on the device, and their lengths.

    Attributes:
        products: by how they are launched, (kernel's name, contiguous, rows on 16 elements): lines of a matrix, its
            first row, the row after its last, where its sums begin.
        sums: how many numbers all sums over rows are.
        even: whether 16 divides the length of every matrix, so that no 16 numbers reach beyond an end.
    """

    shapes: Tensor
    products: dict[tuple[str, bool, bool], Tensor]
    strips: Tensor
    pieces: Tensor
    sums: int
    even: bool


class Cut(NamedTuple):
    """What programs own: rows at a time of wide and of narrow matrices, columns of a strip, elements of a piece."""

    wide: int
    narrow: int
    strip: int
    piece: int


@functools.lru_cache(maxsize=64)
def _work(shapes: Shapes, cut: Cut, device: torch.device) -> Work:
    table: list[list[int]] = []
    products: dict[tuple[str, bool, bool], list[list[int]]] = {}
    strips: list[list[int]] = []
    pieces: list[list[int]] = []
    sums = 0
    for i, (outer, rows, inner) in enumerate(shapes):
        columns = outer * inner
        name, group = ("narrow_products", cut.narrow) if columns <= NARROW else ("wide_products", cut.wide)
        # Blocks of eight groups, or of as many as leave at most 64 blocks to merge.
        size = max(8, ceil_div(rows, 64 * group)) * group
        firsts = range(0, rows, size)
        items = products.setdefault((name, outer == 1, inner % 16 == 0), [])
        items += [[i, first, min(first + size, rows), sums + n * columns] for n, first in enumerate(firsts)]
        mine = [[i, n] for n in range(ceil_div(rows * columns, cut.piece))]
        table.append([outer, rows, inner, sums, len(firsts), len(pieces), len(mine)])
        strips += [[i, first] for first in range(0, columns, cut.strip)]
        pieces += mine
        sums += len(firsts) * columns
    tensors = (torch.tensor(lines, dtype=torch.int64).to(device) for lines in (table, strips, pieces))
    shape_table, strip_table, piece_table = tensors
    product_tables = {k: torch.tensor(items, dtype=torch.int64).to(device) for k, items in products.items()}
    even = all(math.prod(shape) % 16 == 0 for shape in shapes)
    return Work(shape_table, product_tables, strip_table, piece_table, sums, even)


#: By device, pinned memory for the addresses of calls in CUDA graphs, and how much of it is used.
_pinned: dict[torch.device, tuple[Tensor, list[int]]] = {}

#: How many addresses that is: 170 captured calls with 64 weights each.
CAPTURED = 65536


def _pointers(tensors: Iterable[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _addresses(columns: Sequence[list[int]], device: torch.device) -> Tensor:
    """The table of addresses; a column that is not given is as the first."""
    filled = *columns, *columns[: kernels.ADDRESSES.value - len(columns)]
    numbers = tuple(itertools.chain.from_iterable(zip(*filled)))
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _captured_addresses(numbers, device)
    if device.type == "cuda" and device not in _pinned:
        _pinned[device] = torch.empty(CAPTURED, dtype=torch.int64).pin_memory(), [0]
    return _table(numbers, device)


@functools.lru_cache(maxsize=256)
def _table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    # Allocators hand out the same memory again step after step: mostly the table is there.
    table = torch.tensor(numbers, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def _captured_addresses(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """The copy is a part of the graph, so what it copies from stays for good. None can be allocated during capture."""
    if device not in _pinned:
        raise RuntimeError("spectral_normalize must run once before it is captured in a CUDA graph")
    memory, used = _pinned[device]
    if used[0] + len(numbers) > CAPTURED:
        raise RuntimeError(f"spectral_normalize can be captured with up to {CAPTURED // 6} weights in a process")
    part = memory[used[0] : used[0] + len(numbers)]
    used[0] += len(numbers)
    part.copy_(torch.tensor(numbers, dtype=torch.int64))
    return part.to(device, non_blocking=True)


def forward(
    outputs: tuple[list[Tensor], Tensor], weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor],
    n_power_iterations: int, eps: float, semantics: str, backend: str,
) -> None:  # fmt: skip
    out, found = outputs
    sigmas, new_us, new_vs = vectors.parts(found, weights)
    matrices, wide = [matrix(weight) for weight in weights], sigmas.dtype
    us, vs = ([v if v.dtype == wide else v.to(wide) for v in side] for side in (us, vs))
    wide_us, wide_vs = [u.contiguous() for u in us], [m.to_memory(v) for m, v in zip(matrices, vs)]
    vs_there = [new_v if m.order is None else torch.empty_like(new_v) for m, new_v in zip(matrices, new_vs)]
    tensors = [m.tensor for m in matrices]
    there, out_there, *others = map(_pointers, (tensors, out, wide_us, wide_vs, new_us, vs_there))
    device, dtype, size = sigmas.device, DTYPES[weights[0].dtype], weights[0].dtype.itemsize
    configs = {
        kernel: _config(kernel, size, device)
        for kernel in ("wide_products", "narrow_products", "merge", "finish", "divide")
    }
    work = _work(_shapes(matrices), _cut(configs), device)
    addresses = _addresses((there, out_there, *others), device)
    sums = torch.empty(work.sums, dtype=sigmas.dtype, device=device)
    aligned = work.even and _aligned(there)

    def multiply(left: Any, right: Any, dots: bool, add: bool) -> None:
        for (name, contiguous, even), items in work.products.items():
            rows = configs[name]["rows"]
            launch(
                kernels._products, len(items), device, work.shapes, addresses, items, sums,
                LEFT=left, RIGHT=right, DOTS=dots, SUMS=add, ROWS=rows, COLUMNS=_values(configs[name]) // rows,
                DTYPE=dtype, CONTIGUOUS=contiguous, ALIGNED=aligned and even, num_warps=configs[name]["num_warps"],
            )  # fmt: skip
        if add:
            strip = configs["merge"]["strip"]
            launch(
                kernels._merge, len(work.strips), device, work.shapes, addresses, work.strips, sums,
                STRIP=strip, BLOCKS=_values(configs["merge"]) // strip, num_warps=configs["merge"]["num_warps"],
            )  # fmt: skip
        launch(
            kernels._finish, len(matrices), device, work.shapes, addresses, sigmas, eps,
            DOTS=dots, SUMS=add, ITERATED=n_power_iterations > 0, CHUNK=_values(configs["finish"]),
            num_warps=configs["finish"]["num_warps"],
        )  # fmt: skip

    if n_power_iterations == 0:
        multiply(kernels.U, kernels.V, dots=True, add=False)
    for i in range(n_power_iterations):
        left, right = (kernels.NEW_U, kernels.NEW_V) if i else (kernels.U, kernels.V)
        if semantics == "biggan":
            multiply(left, right, dots=False, add=True)
            multiply(left, kernels.NEW_V, dots=True, add=False)
        else:
            multiply(left, right, dots=True, add=True)
    launch(
        kernels._divide, len(work.pieces), device, work.shapes, addresses, work.pieces, sigmas,
        DTYPE=dtype, ALIGNED=aligned and _aligned(out_there), **_piece(configs["divide"]),
    )  # fmt: skip
    for m, v, new_v in zip(matrices, vs_there, new_vs):
        m.from_memory(v, new_v)


def backward(
    grad_weights: list[Tensor], grads: list[Tensor], weights: list[Tensor], found: Tensor, backend: str
) -> None:
    sigmas, us, vs = vectors.parts(found, weights)
    matrices = [matrix(weight) for weight in weights]
    grads = [laid_out_like(grad, like) for grad, like in zip(grads, grad_weights)]
    wide_vs = [m.to_memory(v) for m, v in zip(matrices, vs)]
    tensors = [m.tensor for m in matrices]
    there, out_there, *vectors_there, grads_there = map(_pointers, (tensors, grad_weights, us, wide_vs, grads))
    device, size = sigmas.device, weights[0].dtype.itemsize
    config = _config("gradients", size, device)
    # Of pieces alone; the rest is as in most forward passes, with which it then shares its tables.
    cut = _cut({**CONFIGS[size], "divide": config})
    work = _work(_shapes(matrices), cut, device)
    addresses = _addresses((there, out_there, *vectors_there, grads_there), device)
    products = torch.empty(len(work.pieces), dtype=sigmas.dtype, device=device)
    constants = {
        "DTYPE": DTYPES[weights[0].dtype], "ALIGNED": work.even and _aligned(there + out_there + grads_there),
        **_piece(config),
    }  # fmt: skip
    tables = work.shapes, addresses, work.pieces
    launch(kernels._inner_products, len(work.pieces), device, *tables, products, **constants)
    launch(kernels._gradients, len(work.pieces), device, *tables, products, sigmas, **constants)


def _shapes(matrices: Sequence[Matrix]) -> Shapes:
    return tuple((m.outer, m.rows, m.inner) for m in matrices)


def _aligned(pointers: list[int]) -> bool:
    """Whether 16 numbers at a time never begin off 16 bytes."""
    return all(pointer % 16 == 0 for pointer in pointers)


def _config(kernel: str, size: int, device: torch.device) -> Config:
    return _tuned.configuration(capability(device), "spectral_normalize", kernel, (size,), CONFIGS[size][kernel])


def _cut(configs: Mapping[str, Config]) -> Cut:
    wide, narrow = (configs[kernel]["rows"] for kernel in ("wide_products", "narrow_products"))
    return Cut(wide, narrow, configs["merge"]["strip"], configs["divide"]["piece"])


def _values(config: Config) -> int:
    """What a program takes at a time."""
    return 32 * config["num_warps"] * config["values"]


def _piece(config: Config) -> dict[str, int]:
    return {"PIECE": config["piece"], "CHUNK": _values(config), "num_warps": config["num_warps"]}
