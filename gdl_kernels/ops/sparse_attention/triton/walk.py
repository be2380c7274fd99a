"""Inside a kernel: which tile a program owns, which blocks its list holds, and which of their pairs are kept."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

#: Kernel arguments of which Triton makes no variants (of 1, of multiples of 16), so that a new length compiles nothing.
SCALARS = (
    "start", "seed", "n_batch", "n_heads", "n_q", "n_k", "query_start", "n_layout_q", "n_lines",
    "n_tiles", "n_splits", "whole", "causal", "ragged", "list_step", "order_step", "threshold",
)  # fmt: skip


class Lists(NamedTuple):
    """A layout's rows or columns, as :class:`gdl_kernels.layouts.BlockLists` has them."""

    starts: Any
    splits: Any
    blocks: Any
    masks: Any
    longest_first: Any


class Keys(NamedTuple):
    """How a program that owns queries gets at the keys of its list.

    Attributes:
        lists: the layout's rows.
        table: masks of partial blocks.
        order: of the program's head; None where places are positions.
        n_places: places that ``order`` has.
        padding: the key padding mask of the program's batch, or None.
        n_seen: keys from this position on are not read.
    """

    lists: Any
    table: Any
    order: Any
    n_places: Any
    padding: Any
    n_seen: Any


@triton.jit
def load_rows(base, rows, inside, strides, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    # Rows of a (batch, heads, positions, features) tensor at one batch and head; 0 outside.
    features = tl.arange(0, BLOCK_D).to(tl.int64)
    pointers = base + rows.to(tl.int64)[:, None] * strides[2] + features[None, :] * strides[3]
    if MASKED:
        tile = tl.load(pointers, mask=inside[:, None] & (features < D)[None, :], other=0.0)
    elif D < BLOCK_D:
        tile = tl.load(pointers, mask=(features < D)[None, :], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile  # [rows, BLOCK_D]


@triton.jit
def load_tile(
    base, descriptor, batch, head, start, rows, inside, strides, D: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    # The rows of a tile of the list: through the copy engine of sm_90 and later where the launcher made a descriptor,
    # which stands for the whole tensor. Then they are consecutive from ``start`` on, and 0 outside.
    if descriptor is not None:
        tile = descriptor.load([batch.to(tl.int32), head.to(tl.int32), start, 0])
        tile = tl.reshape(tile, [tile.shape[2], tile.shape[3]])
    else:
        tile = load_rows(base, rows, inside, strides, D, BLOCK_D, MASKED)
    return tile  # [rows, BLOCK_D]


@triton.jit
def store_rows(base, rows, inside, strides, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    features = tl.arange(0, BLOCK_D).to(tl.int64)
    pointers = base + rows.to(tl.int64)[:, None] * strides[2] + features[None, :] * strides[3]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside[:, None] & (features < D)[None, :])


@triton.jit
def first_position(start, query_start, n_layout_q):
    # Of the call's queries. One that the layout does not have keeps nothing, and so do all after it.
    first = query_start
    if start is not None:
        first = tl.load(start).to(tl.int64) + query_start
        first = tl.where((first < 0) | (first > n_layout_q), n_layout_q, first).to(tl.int32)
    return first


@triton.jit
def n_seen_keys(first, n_q, n_k, causal):
    # Under a causal layout no query sees a key past the last query.
    return tl.where(causal != 0, tl.minimum(n_k, first + n_q), n_k)


@triton.jit
def own_tile(
    work, first_tile, longest_first, n_batch, n_heads, n_lines, n_tiles, whole, list_step, BLOCKS_TILES: tl.constexpr,
    LAST_FIRST: tl.constexpr,
):  # fmt: skip
    # Work is handed out longest list first where a call uses the whole layout. Elsewhere the order is a guess at that:
    # under a causal layout late queries keep the most, and early keys are kept by the most.
    if whole:
        sharing = n_batch * tl.where(list_step != 0, 1, n_heads)  # (batch, head)s that walk one list
        entry = tl.load(longest_first + work // (BLOCKS_TILES * sharing))
        other = work % (BLOCKS_TILES * sharing) // BLOCKS_TILES
        batch = tl.where(list_step != 0, other, other // n_heads)
        head = tl.where(list_step != 0, entry // n_lines, other % n_heads)
        own = entry % n_lines * BLOCKS_TILES + work % BLOCKS_TILES
    else:
        batch, head = work // n_tiles // n_heads, work // n_tiles % n_heads
        if LAST_FIRST:
            own = first_tile + n_tiles - 1 - work % n_tiles
        else:
            own = first_tile + work % n_tiles
    return batch.to(tl.int64), head.to(tl.int64), own


@triton.jit
def positions_of(order, places, n_places):
    # The position that each place holds; past the last place the place itself, a position that the layout has not.
    if order is not None:
        positions = tl.load(order + places, mask=places < n_places, other=places)
    else:
        positions = places
    return positions


@triton.jit
def list_bounds(lists, line, ragged, BLOCK: tl.constexpr, STEP: tl.constexpr):
    # Tiles made of full blocks alone, then everything else: partial blocks, and full ones that fill no whole tile, or
    # whose keys may be missing.
    first, last = tl.load(lists.starts + line), tl.load(lists.starts + line + 1)
    full = tl.where(ragged != 0, 0, tl.load(lists.splits + line) - first)
    if STEP <= BLOCK:
        full_tiles = full * (BLOCK // STEP)
        rest = first + full
        rest_tiles = (last - rest) * (BLOCK // STEP)
    else:
        full_tiles = full // (STEP // BLOCK)
        rest = first + full_tiles * (STEP // BLOCK)
        rest_tiles = tl.cdiv(last - rest, STEP // BLOCK)
    return first, full_tiles, rest, rest_tiles, last


@triton.jit
def list_tile(blocks, first, last, tile, BLOCK: tl.constexpr, STEP: tl.constexpr):
    # Places of a tile's lanes, INT_MAX past the end of the list, and each lane's index in its block.
    lane = tl.arange(0, STEP)
    if STEP <= BLOCK:
        inner = (tile % (BLOCK // STEP)) * STEP + lane
        places = tl.load(blocks + first + tile // (BLOCK // STEP)) * BLOCK + inner
    else:
        inner = lane % BLOCK
        item = first + tile * (STEP // BLOCK) + lane // BLOCK
        places = tl.load(blocks + item, mask=item < last, other=0) * BLOCK + inner
        places = tl.where(item < last, places, 2147483647)
    return places, inner


@triton.jit
def tile_start(blocks, first, tile, BLOCK: tl.constexpr, STEP: tl.constexpr):
    # The first place of a tile that is a part of one block.
    return tl.load(blocks + first + tile // (BLOCK // STEP)) * BLOCK + tile % (BLOCK // STEP) * STEP


@triton.jit
def key_tile(keys, first, last, tile, BLOCK: tl.constexpr, STEP: tl.constexpr):
    # Positions of a tile's lanes, each lane's index in its block, and whether its key may be read.
    places, inner = list_tile(keys.lists.blocks, first, last, tile, BLOCK, STEP)
    positions = positions_of(keys.order, places, keys.n_places)
    inside = positions < keys.n_seen
    if keys.padding is not None:
        inside &= tl.load(keys.padding + positions, mask=inside, other=1) == 0
    return positions, inner, inside


# A packed word of the mask table covers 32 columns of a row. The next two functions load a word once for each row and
# let every lane of the tile pick its bit: no pointer for each element of the tile, which would cost more than the
# scores. A full block that fills no whole tile has mask -1, all ones.


@triton.jit
def kept_keys(lists, table, first, last, tile, row, column, BLOCK: tl.constexpr, STEP: tl.constexpr):
    # Bits [rows, STEP] of a tile whose lanes are columns; ``row`` and ``column`` are indices in the block.
    WORDS: tl.constexpr = (BLOCK + 31) // 32
    SEGMENT: tl.constexpr = 16 if BLOCK == 16 or STEP == 16 else 32  # lanes that read one word
    lane = tl.arange(0, STEP)
    word = tl.zeros([row.shape[0], STEP], tl.int32)
    for segment in tl.static_range(STEP // SEGMENT):
        if STEP <= BLOCK:
            item = first + tile // (BLOCK // STEP)
            index = ((tile % (BLOCK // STEP)) * STEP + segment * SEGMENT) // 32
        else:
            item = first + tile * (STEP // BLOCK) + segment * SEGMENT // BLOCK
            index = segment * SEGMENT % BLOCK // 32
        mask = tl.load(lists.masks + item, mask=item < last, other=-1).to(tl.int64)
        bits = tl.load(table + mask * (BLOCK * WORDS) + index + row * WORDS, mask=mask >= 0, other=-1)
        word = tl.where((lane // SEGMENT == segment)[None, :], bits[:, None], word)
    return ((word >> (column & 31)[None, :]) & 1) != 0


@triton.jit
def kept_queries(
    lists, table, first, last, tile, row, own_start, OWN: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr
):
    # Bits [OWN, STEP] of a tile whose lanes are rows, for the OWN columns from ``own_start`` in the block on.
    WORDS: tl.constexpr = (BLOCK + 31) // 32
    SEGMENT: tl.constexpr = 16 if OWN == 16 else 32  # columns in one word
    lane = tl.arange(0, STEP)
    if STEP <= BLOCK:
        item = first + tile // (BLOCK // STEP) + lane * 0
    else:
        item = first + tile * (STEP // BLOCK) + lane // BLOCK
    mask = tl.load(lists.masks + item, mask=item < last, other=-1).to(tl.int64)
    column = tl.arange(0, OWN)
    word = tl.zeros([OWN, STEP], tl.int32)
    for segment in tl.static_range(OWN // SEGMENT):
        index = (own_start + segment * SEGMENT) // 32
        bits = tl.load(table + mask * (BLOCK * WORDS) + index + row * WORDS, mask=mask >= 0, other=-1)
        word = tl.where((column // SEGMENT == segment)[:, None], bits[None, :], word)
    return ((word >> ((own_start + column) & 31)[:, None]) & 1) != 0


@triton.jit
def kept_keys_of_row(lists, table, first, last, tile, row, column, BLOCK: tl.constexpr, STEP: tl.constexpr):
    # Bits [STEP] of a single row, where a word for each lane is cheap.
    WORDS: tl.constexpr = (BLOCK + 31) // 32
    lane = tl.arange(0, STEP)
    if STEP <= BLOCK:
        item = first + tile // (BLOCK // STEP) + lane * 0
    else:
        item = first + tile * (STEP // BLOCK) + lane // BLOCK
    mask = tl.load(lists.masks + item, mask=item < last, other=-1).to(tl.int64)
    word = tl.load(table + mask * (BLOCK * WORDS) + row * WORDS + column // 32, mask=mask >= 0, other=-1)
    return ((word >> (column & 31)) & 1) != 0
