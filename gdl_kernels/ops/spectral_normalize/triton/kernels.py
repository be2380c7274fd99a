"""The Triton kernels: every program takes a piece of work of one matrix, found in tables.

``shapes`` has a line of SHAPE numbers for each matrix: outer, rows, inner; where its sums begin, how many blocks of
rows they are of; its first piece, how many it has. ``addresses`` has a line of ADDRESSES. Both are int64.
"""

from __future__ import annotations

import triton
import triton.language as tl

SHAPE = tl.constexpr(7)
ADDRESSES = tl.constexpr(6)

# Columns of ``addresses``, forward and backward.
WEIGHT, OUT, U, V, NEW_U, NEW_V = (tl.constexpr(i) for i in range(6))
GRAD, GRAD_WEIGHT = tl.constexpr(4), tl.constexpr(1)


@triton.jit
def _shape(shapes, matrix):
    line = shapes + matrix * SHAPE
    return tl.load(line), tl.load(line + 1), tl.load(line + 2)  # outer, rows, inner


@triton.jit
def _pointer(addresses, matrix, WHICH: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(addresses + matrix * ADDRESSES + WHICH).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _weights(weight, rows, columns, n_rows, n_columns, inner, CONTIGUOUS: tl.constexpr):
    # [rows, columns] of a matrix that lies as [outer][rows][inner].
    if CONTIGUOUS:
        offsets = rows[:, None] * inner + columns[None, :]
    else:
        # A row is shorter than 2^31, a matrix may not be: divisions of 64 bits cost much more.
        narrow = inner.to(tl.int32)
        in_row = (columns // narrow).to(tl.int64) * n_rows * inner + columns % narrow
        offsets = in_row[None, :] + rows[:, None] * inner
    mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    return tl.load(weight + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _products(
    shapes, addresses, work, sums, LEFT: tl.constexpr, RIGHT: tl.constexpr, DOTS: tl.constexpr, SUMS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr, CONTIGUOUS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    # DOTS: s = W v. SUMS: for this block of rows t = W' f, of f = s or without DOTS of f = u. A program owns a block
    # and takes ROWS of it at a time: few enough that the L2 still has them when t reads them again.
    item = tl.program_id(0)
    matrix, first = tl.load(work + item * 4), tl.load(work + item * 4 + 1)
    end, begin = tl.load(work + item * 4 + 2), tl.load(work + item * 4 + 3)
    outer, n_rows, _inner = _shape(shapes, matrix)
    inner = tl.load(shapes + matrix * SHAPE + 2)  # what a call returns can't be said to be a multiple
    n_columns = (outer * inner).to(tl.int32)
    if ALIGNED:
        inner = tl.multiple_of(inner, 16)
        n_columns = tl.multiple_of(n_columns, 16)
    weight = _pointer(addresses, matrix, WEIGHT, DTYPE, ALIGNED)
    u = _pointer(addresses, matrix, LEFT, tl.float32, False)
    v = _pointer(addresses, matrix, RIGHT, tl.float32, False)
    s = _pointer(addresses, matrix, NEW_U, tl.float32, False)
    for start in range(first, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        if DOTS:
            dots = tl.zeros([ROWS, COLUMNS], tl.float32)
            for column in range(0, n_columns, COLUMNS):
                columns = column + tl.arange(0, COLUMNS)
                w = _weights(weight, rows, columns, n_rows, n_columns, inner, CONTIGUOUS)
                dots += w * tl.load(v + columns, mask=columns < n_columns, other=0.0)[None, :]
            factors = tl.sum(dots, 1)  # [ROWS]
            tl.store(s + rows, factors, mask=rows < end)
        else:
            factors = tl.load(u + rows, mask=rows < end, other=0.0)
        if SUMS:
            for column in range(0, n_columns, COLUMNS):
                columns = column + tl.arange(0, COLUMNS)
                w = _weights(weight, rows, columns, n_rows, n_columns, inner, CONTIGUOUS)
                t = tl.sum(w * factors[:, None], 0)  # [COLUMNS]
                inside = columns < n_columns
                # A thread reads what it wrote itself: the layout of t is the same each time.
                t += tl.load(sums + begin + columns, mask=inside & (start > first), other=0.0)
                tl.store(sums + begin + columns, t, mask=inside)


@triton.jit
def _merge(shapes, addresses, strips, sums, STRIP: tl.constexpr, BLOCKS: tl.constexpr):
    # t of a strip of columns: the sums of a matrix's blocks, in their order.
    item = tl.program_id(0)
    matrix, first = tl.load(strips + item * 2), tl.load(strips + item * 2 + 1)
    outer, _rows, inner = _shape(shapes, matrix)
    begin, n_blocks = tl.load(shapes + matrix * SHAPE + 3), tl.load(shapes + matrix * SHAPE + 4)
    columns = first + tl.arange(0, STRIP)
    inside = columns < outer * inner
    total = tl.zeros([BLOCKS, STRIP], tl.float32)
    for start in range(0, n_blocks, BLOCKS):
        blocks = start + tl.arange(0, BLOCKS)
        pointers = sums + begin + blocks[:, None] * outer * inner + columns[None, :]
        total += tl.load(pointers, mask=(blocks < n_blocks)[:, None] & inside[None, :], other=0.0)
    t = _pointer(addresses, matrix, NEW_V, tl.float32, False)
    tl.store(t + columns, tl.sum(total, 0), mask=inside)


@triton.jit
def _dot(x, y, n, CHUNK: tl.constexpr):
    total = tl.zeros([CHUNK], tl.float32)
    for start in range(0, n, CHUNK):
        i = start + tl.arange(0, CHUNK)
        total += tl.load(x + i, mask=i < n, other=0.0) * tl.load(y + i, mask=i < n, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _scaled(x, y, n, by, CHUNK: tl.constexpr):
    for start in range(0, n, CHUNK):
        i = start + tl.arange(0, CHUNK)
        tl.store(y + i, tl.math.div_rn(tl.load(x + i, mask=i < n, other=0.0), by), mask=i < n)


@triton.jit
def _bounded(length, eps):
    return tl.where(length < eps, eps, length)  # NaN where length is


@triton.jit
def _finish(
    shapes, addresses, sigmas, eps, DOTS: tl.constexpr, SUMS: tl.constexpr, ITERATED: tl.constexpr, CHUNK: tl.constexpr
):
    # From s in new_u and t in new_v to vectors of length 1, and sigma = u' W v. A program owns a matrix.
    matrix = tl.program_id(0)
    outer, n_rows, inner = _shape(shapes, matrix)
    n_columns = outer * inner
    s = _pointer(addresses, matrix, NEW_U, tl.float32, False)
    t = _pointer(addresses, matrix, NEW_V, tl.float32, False)
    if ITERATED:
        sigma = 0.0
        shrink = 1.0
        if DOTS:
            length = tl.math.sqrt_rn(_dot(s, s, n_rows, CHUNK))
            shrink = _bounded(length, eps)
            _scaled(s, s, n_rows, shrink, CHUNK)
            sigma = length * tl.math.div_rn(length, shrink)  # u' s
        if SUMS:
            # t is W' s, and W' u is that over the length of s.
            _scaled(t, t, n_columns, shrink, CHUNK)
            tl.debug_barrier()
            length = tl.math.sqrt_rn(_dot(t, t, n_columns, CHUNK))
            bound = _bounded(length, eps)
            _scaled(t, t, n_columns, bound, CHUNK)
            sigma = length * tl.math.div_rn(length, bound)  # (W' u)' v
    else:
        u = _pointer(addresses, matrix, U, tl.float32, False)
        v = _pointer(addresses, matrix, V, tl.float32, False)
        sigma = _dot(u, s, n_rows, CHUNK)
        tl.debug_barrier()
        _scaled(u, s, n_rows, 1.0, CHUNK)
        _scaled(v, t, n_columns, 1.0, CHUNK)
    tl.store(sigmas + matrix, sigma)


@triton.jit
def _divide(
    shapes, addresses, pieces, sigmas, PIECE: tl.constexpr, CHUNK: tl.constexpr, DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    matrix, first = tl.load(pieces + item * 2), tl.load(pieces + item * 2 + 1)
    outer, n_rows, inner = _shape(shapes, matrix)
    weight = _pointer(addresses, matrix, WEIGHT, DTYPE, ALIGNED)
    out = _pointer(addresses, matrix, OUT, DTYPE, ALIGNED)
    sigma = tl.load(sigmas + matrix)
    size = outer * n_rows * inner
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    for start in range(first * PIECE, tl.minimum(first * PIECE + PIECE, size), CHUNK):
        i = start + tl.arange(0, CHUNK)
        mask = i < size
        w = tl.load(weight + i, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + i, tl.math.div_rn(w, sigma).to(DTYPE), mask=mask)


@triton.jit
def _inner_products(
    shapes, addresses, pieces, products, PIECE: tl.constexpr, CHUNK: tl.constexpr, DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    # <G, W> of a piece.
    item = tl.program_id(0)
    matrix, first = tl.load(pieces + item * 2), tl.load(pieces + item * 2 + 1)
    outer, n_rows, inner = _shape(shapes, matrix)
    weight = _pointer(addresses, matrix, WEIGHT, DTYPE, ALIGNED)
    grad = _pointer(addresses, matrix, GRAD, DTYPE, ALIGNED)
    total = tl.zeros([CHUNK], tl.float32)
    size = outer * n_rows * inner
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    for start in range(first * PIECE, tl.minimum(first * PIECE + PIECE, size), CHUNK):
        i = start + tl.arange(0, CHUNK)
        mask = i < size
        w = tl.load(weight + i, mask=mask, other=0.0).to(tl.float32)
        total += w * tl.load(grad + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(products + item, tl.sum(total, 0))


@triton.jit
def _gradients(
    shapes, addresses, pieces, products, sigmas, PIECE: tl.constexpr, CHUNK: tl.constexpr, DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    # (G - <G, W> / sigma u v') / sigma of a piece. Each program adds up its matrix's products itself, in one order.
    item = tl.program_id(0)
    matrix, first = tl.load(pieces + item * 2), tl.load(pieces + item * 2 + 1)
    outer, n_rows, inner = _shape(shapes, matrix)
    first_piece, n_pieces = tl.load(shapes + matrix * SHAPE + 5), tl.load(shapes + matrix * SHAPE + 6)
    total = tl.zeros([CHUNK], tl.float32)
    for start in range(0, n_pieces, CHUNK):
        i = start + tl.arange(0, CHUNK)
        total += tl.load(products + first_piece + i, mask=i < n_pieces, other=0.0)
    sigma = tl.load(sigmas + matrix)
    along = tl.math.div_rn(tl.sum(total, 0), sigma)
    grad = _pointer(addresses, matrix, GRAD, DTYPE, ALIGNED)
    grad_weight = _pointer(addresses, matrix, GRAD_WEIGHT, DTYPE, ALIGNED)
    u = _pointer(addresses, matrix, U, tl.float32, False)
    v = _pointer(addresses, matrix, V, tl.float32, False)
    narrow = inner.to(tl.int32)  # as in _weights
    size = outer * n_rows * inner
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    for start in range(first * PIECE, tl.minimum(first * PIECE + PIECE, size), CHUNK):
        i = start + tl.arange(0, CHUNK)
        mask = i < size
        line = start // inner
        i_in_line = (start - line * inner).to(tl.int32) + tl.arange(0, CHUNK)
        lines = line + i_in_line // narrow
        column = lines // n_rows * inner + i_in_line % narrow
        factor = along * tl.load(u + lines % n_rows, mask=mask, other=0.0)
        g = tl.load(grad + i, mask=mask, other=0.0).to(tl.float32)
        value = tl.math.div_rn(g - factor * tl.load(v + column, mask=mask, other=0.0), sigma)
        tl.store(grad_weight + i, value.to(DTYPE), mask=mask)
