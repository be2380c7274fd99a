"""What the launchers share: an op's arguments as kernels take them, tile sizes, the launch itself."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .... import _native, _tuned
from ...._triton import capability, ceil_div, power_of_two
from ...._tuned import Config
from .walk import Lists

#: ``(own, step, num_stages)`` for 16-bit inputs, by the major compute capability that a row was made for, kernel and
#: padded head size. ``own`` is at most a block; a ``step`` is several small blocks, or a part of a large one. A tile's
#: address hangs on a load of its own, that of the block's number, so five stages keep two tiles in flight, three keep
#: one. Up to 128 features, in blocks of 64 and 128, nothing spills, and row 8 needs at most the 99 KB of shared memory
#: of the smaller chips of its generation. Above, some spill: in the gradients of keys and values two accumulators alone
#: fill the registers. Chosen by what the compiler reports; what was timed is in the tables of ``tuned``.
TILES = {
    8: {
        "forward": {64: (128, 64, 5), 128: (128, 32, 5), 256: (64, 16, 3)},
        "grad_query": {64: (128, 32, 5), 128: (64, 32, 5), 256: (64, 16, 3)},
        "grad_key_value": {64: (128, 32, 3), 128: (64, 16, 3), 256: (64, 16, 2)},
        "double_rows": {64: (64, 16, 3), 128: (32, 16, 3), 256: (32, 16, 1)},
        "double_columns": {64: (64, 16, 3), 128: (32, 16, 3), 256: (32, 16, 1)},
    },
    9: {
        "forward": {64: (128, 64, 5), 128: (128, 64, 5), 256: (64, 16, 5)},
        "grad_query": {64: (128, 64, 5), 128: (128, 32, 5), 256: (64, 16, 3)},
        "grad_key_value": {64: (128, 64, 5), 128: (128, 32, 3), 256: (64, 16, 3)},
        "double_rows": {64: (64, 32, 3), 128: (32, 16, 3), 256: (32, 16, 1)},
        "double_columns": {64: (64, 32, 3), 128: (32, 32, 3), 256: (32, 16, 1)},
    },
}


@functools.cache
def built_in_tiles(
    kernel: str, capability: int, head_dim: int, block_size: int, itemsize: int, dropout: bool
) -> Config:
    """How a kernel with tiles is launched where no table says otherwise.

    Args:
        kernel: a name in :data:`TILES`, or ``"decode"``, whose programs own heads.
        capability: the GPU's compute capability, as in ``sm_90``.
        head_dim: the larger of the padded head sizes.
        itemsize: bytes an element.
        dropout: whether the kernel draws random numbers.
    """
    if kernel == "decode":
        # Nothing is computed twice and little is computed: what counts is bytes in flight. Four programs find work on
        # each multiprocessor.
        step, num_stages = 32 if itemsize == 4 or head_dim > 128 else 64, 1 if itemsize == 4 else 3
        return {"step": step, "programs": 4, "num_stages": num_stages, "num_warps": 4}
    if itemsize == 4:
        # "ieee" products of float32 run on the ordinary cores, operands in registers: small tiles, many warps.
        return _tiles(min(32, block_size), 16, 1, 4 if head_dim <= 64 else 8)
    # Only data-centre Hopper (9) and Blackwell (10) have the shared memory that row 9 asks for.
    own, step, num_stages = TILES[9 if capability // 10 in (9, 10) else 8][kernel][max(64, head_dim)]
    own = min(own, block_size)
    if dropout and kernel not in ("forward", "grad_query"):
        step = max(16, step // 2)  # or the random numbers of a tile would spill
    if kernel in ("double_rows", "double_columns"):
        # So many tiles at once that a program owns few positions, and warps share their rows.
        return _tiles(own, step, num_stages, 8 if kernel == "double_rows" and head_dim > 64 else 4)
    if own < 64:
        # Few warps share a tile's loads: a large one would take all their registers for addresses.
        step, num_stages = (16, 2) if kernel == "grad_key_value" else (max(16, min(step, 128 * own // head_dim)), 3)
    # A tensor core instruction takes 16 rows a warp (four warps make Hopper's 64): fewer warps would hold more
    # accumulators than there are registers, more would all compute the same rows.
    return _tiles(own, step, num_stages, own // 16)


def _tiles(own: int, step: int, num_stages: int, num_warps: int) -> Config:
    return {"own": own, "step": step, "num_stages": num_stages, "num_warps": num_warps}


#: The dtype that each input dtype is multiplied in. Triton's interpreter can't multiply bfloat16; the products of two
#: bfloat16 are exact in float32, so what it computes there is the same but for the rounding of the weights.
DOT = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.float32 if _native.interpreting() else tl.bfloat16,
}


@functools.cache
def padded(features: int) -> int:
    """A head size as a tile has it."""
    return max(16, power_of_two(features))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    # For the interpreter few, so that in tests a row may be split or not.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def decode_splits(device: torch.device, programs: int, wanted: int, most: int) -> int:
    """Among how many programs each row is split, so that ``wanted`` find work on each multiprocessor.

    From sizes alone: what a row keeps, and where the queries start, only the GPU knows.
    """
    return max(1, min(most, wanted * multiprocessors(device) // max(1, programs)))


def _descriptor(tensor: Tensor, positions: int, step: int) -> TensorDescriptor | None:
    strides, sizes = tensor.stride(), tensor.shape
    if not positions or tensor.data_ptr() % 16 or not _is_loadable(sizes, strides, tensor.element_size()):
        return None
    batch, heads, _, features = sizes
    # Not by its own constructor, which checks again what was just checked.
    descriptor = TensorDescriptor.__new__(TensorDescriptor)
    descriptor.base, descriptor.shape, descriptor.strides = tensor, [batch, heads, positions, features], list(strides)
    descriptor.block_shape, descriptor.padding = [1, 1, step, features], "zero"
    return descriptor


@functools.lru_cache(maxsize=1024)
def _is_loadable(sizes: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Whether the copy engine takes such a tensor, and its rows fill those of a tile."""
    aligned = strides[-1] == 1 and all(s > 0 and s * itemsize % 16 == 0 for s in strides[:-1])
    return aligned and sizes[-1] == padded(sizes[-1]) and sizes[0] > 0


class Side(NamedTuple):
    """The lists that a kernel walks: a layout's rows or its columns.

    Attributes:
        lists: see :class:`walk.Lists`.
        n_lines: block rows, or block columns, of one head.
    """

    lists: Lists
    n_lines: int


class Call:
    """The arguments that every op of sparse_attention ends with, and what follows from them."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, layout: Sequence[Tensor],
        sizes: Sequence[int], scale: float, query_start: int, start_tensor: Tensor | None, dropout_p: float,
        seed: Tensor | None, _backend: str,
    ) -> None:  # fmt: skip
        self.device, self.dtype = query.device, query.dtype
        self.batch, self.heads, self.n_q, self.head_dim = query.shape
        self.kv_heads, self.n_k, self.value_dim = value.shape[1:]
        self.group = self.heads // self.kv_heads
        self.layout_n_q, self.layout_n_k, self.block_size, self.causal = sizes
        self.rows = Side(Lists(*layout[:5]), ceil_div(self.layout_n_q, self.block_size))
        self.columns = Side(Lists(*layout[5:10]), ceil_div(self.layout_n_k, self.block_size))
        self.table, order, places = layout[10], layout[11], layout[12]
        self.order = order if order.numel() else None
        self.places = places if order.numel() else None
        self.list_step = int(self.rows.lists.splits.shape[0] > 1)  # 0 where all heads share their lists
        self.order_step = order.shape[1] if order.shape[0] > 1 else 0  # 0 where all heads share their order
        # Contiguous, for a stride that is a length would compile a variant when 16 divides it. In 16 bits: Triton lays
        # a product's factors out by the narrowest number loaded for them, halved where random numbers are joined. For
        # bytes and dropout that is 32 terms, and a product that has but 16 then adds each twice (Triton 3.6, 3.7).
        self.padding = None if key_padding_mask is None else key_padding_mask.to(torch.int16).contiguous()
        self.start, self.query_start, self.seed = start_tensor, query_start, seed
        self.scale = scale
        self.threshold, self.keep_scale = int(dropout_p * 2**31), 1 / (1 - dropout_p)

    def tiles(self, kernel: str) -> tuple[Config, dict[str, Any]]:
        """A kernel's tile sizes, and the constants that it is compiled for."""
        block_d, block_dv = padded(self.head_dim), padded(self.value_dim)
        key = max(block_d, block_dv), self.block_size, self.dtype.itemsize, int(self.seed is not None)
        config = self.config(kernel, key, built_in_tiles(kernel, capability(self.device), *key))
        return config, {
            "D": self.head_dim, "DV": self.value_dim, "BLOCK_D": block_d, "BLOCK_DV": block_dv,
            "BLOCK": self.block_size, "STEP": config["step"], "DOT": DOT[self.dtype],
            "num_stages": config["num_stages"], "num_warps": config["num_warps"],
            **({"OWN": config["own"]} if "own" in config else {}),
        }  # fmt: skip

    def config(self, kernel: str, key: tuple[int, ...], built_in: Config) -> Config:
        """The launch configuration of a kernel: the tuned table's where that has one, else its own."""
        return _tuned.configuration(capability(self.device), "sparse_attention", kernel, key, built_in)

    def key_descriptors(self, key: Tensor, value: Tensor, step: int) -> tuple[TensorDescriptor | None, ...]:
        """What the copy engine of sm_90 and later loads ``step`` keys and values by; None where it can't.

        It loads consecutive positions, and leaves out none but those past the keys that are seen.
        """
        n_seen = min(self.n_k, self.query_start + self.n_q) if self.causal else self.n_k
        able = self._has_copy_engine(step) and self.padding is None
        return tuple(_descriptor(t, n_seen, step) if able else None for t in (key, value))

    def query_descriptors(self, query: Tensor, grad_out: Tensor, step: int) -> tuple[TensorDescriptor | None, ...]:
        """The same for queries and for the gradient of the output."""
        able = self._has_copy_engine(step)
        return tuple(_descriptor(t, self.n_q, step) if able else None for t in (query, grad_out))

    def _has_copy_engine(self, step: int) -> bool:
        if capability(self.device) < 90 or self.dtype.itemsize != 2:
            return False
        return self.order is None and self.start is None and step <= self.block_size

    def tensors(self, side: Side) -> tuple[Any, ...]:
        """What a kernel takes before its strides: lists, table, order, padding, start, seed."""
        return side.lists, self.table, self.order, self.padding, self.start, self.seed

    def scalars(self, side: Side, n_tiles: int, whole: bool) -> tuple[int | float, ...]:
        """What a kernel takes after its strides: n_batch, n_heads, group, n_q, n_k, query_start, n_layout_q, n_lines,
        n_tiles, whole, causal, ragged, list_step, order_step, threshold, keep_scale, scale.
        """
        # A start that is read on the GPU may put queries past the keys that are there.
        ragged = self.start is not None and self.n_k < self.layout_n_k
        return (
            self.batch, self.heads, self.group, self.n_q, self.n_k, self.query_start, self.layout_n_q, side.n_lines,
            n_tiles, int(whole), self.causal, int(ragged), self.list_step, self.order_step, self.threshold,
            self.keep_scale, self.scale,
        )  # fmt: skip

    def row_work(self, own: int) -> tuple[int, int, bool]:
        """Tiles of ``own`` queries for each head, all tiles, and whether they are all of the layout's."""
        if self.start is None and self.query_start == 0 and self.n_q == self.layout_n_q:
            n_tiles, whole = self.rows.n_lines * (self.block_size // own), True
        elif self.order is None:
            # Enough wherever the first query lies in its tile, which the host may not know.
            n_tiles, whole = ceil_div(self.n_q - 1, own) + 1, False
        else:
            # Any tile may hold a query of the call, and queries past the end of the layout lie past its last place.
            past = self.n_q if self.start is not None else 0
            n_tiles, whole = ceil_div(self.layout_n_q + past, own), False
        return n_tiles, n_tiles * self.batch * self.heads if self.n_q else 0, whole

    def column_work(self, own: int, summed: int) -> tuple[int, int, bool]:
        """Tiles of ``own`` keys for each gradient, all tiles, and whether they are all of the layout's.

        Args:
            summed: query heads that add to one gradient.
        """
        if self.n_k == self.layout_n_k and (self.list_step == 0 or summed == 1):
            n_tiles, whole = self.columns.n_lines * (self.block_size // own), True
        else:
            n_tiles, whole = ceil_div(self.n_k if self.order is None else self.layout_n_k, own), False
        return n_tiles, n_tiles * self.batch * (self.heads // summed), whole

    def summed(self) -> int:
        """Query heads that a program can add to one gradient of keys and values.

        A program owns places. Query heads that put different keys there can't share its accumulators.
        """
        return self.group if self.order_step == 0 else 1

    @contextlib.contextmanager
    def summed_over_groups(self, *grads: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """What a kernel fills in place of gradients of keys and values: themselves, or float32 parts for query heads
        that can't be added by one program, which are summed in the end.
        """
        if self.summed() == self.group:
            yield grads
            return
        shape = (self.batch, self.heads, self.n_k)
        parts = tuple(torch.empty(*shape, g.shape[3], dtype=torch.float32, device=self.device) for g in grads)
        yield parts
        for grad, part in zip(grads, parts):
            grad.copy_(part.unflatten(1, (self.kv_heads, self.group)).sum(2))

    def empty_like_rows(self, count: int) -> list[Tensor]:
        """Float32 ``(B, H, Nq)``, several."""
        shape = (self.batch, self.heads, self.n_q)
        return [torch.empty(shape, dtype=torch.float32, device=self.device) for _ in range(count)]
