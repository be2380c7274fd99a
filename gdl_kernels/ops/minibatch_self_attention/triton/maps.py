"""Images inside a kernel: a tile of pixels by channels, pooling, and what the kernels make of a tile of keys.

``strides`` are from image to image, channel to channel, pixel to pixel.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _addresses(image, strides, pixels, CHANNELS: tl.constexpr):
    # In 64 bits: in a batch that lies pixel by pixel one image spans all of it.
    channels = tl.arange(0, CHANNELS).to(tl.int64)
    return image + pixels.to(tl.int64)[:, None] * strides[2] + channels[None, :] * strides[1]  # [PIXELS, CHANNELS]


@triton.jit
def load_pixels(image, strides, pixels, inside, C: tl.constexpr, BLOCK_C: tl.constexpr):
    # 0 outside of the map and in the channels that fill up a tile.
    there = inside[:, None] & (tl.arange(0, BLOCK_C) < C)[None, :]
    return tl.load(_addresses(image, strides, pixels, BLOCK_C), mask=there, other=0.0)  # [PIXELS, BLOCK_C]


@triton.jit
def store_pixels(image, strides, pixels, inside, values, C: tl.constexpr, BLOCK_C: tl.constexpr):
    there = inside[:, None] & (tl.arange(0, BLOCK_C) < C)[None, :]
    tl.store(_addresses(image, strides, pixels, BLOCK_C), values.to(image.dtype.element_ty), mask=there)


@triton.jit
def store_windows(
    image, strides, winner, winner_strides, windows, inside, values, width, C: tl.constexpr, BLOCK_C: tl.constexpr
):
    # The gradient of what was pooled: to the winner of each window, and zeros to the other three. width: in windows.
    # winner is None where nothing was pooled.
    if winner is None:
        store_pixels(image, strides, windows, inside, values, C, BLOCK_C)
    else:
        won = load_pixels(winner, winner_strides, windows, inside, C, BLOCK_C)
        first = first_pixel(windows, width)
        for corner in range(4):  # not unrolled: the addresses of all four would fill the registers
            pixels = first + corner // 2 * (2 * width) + corner % 2
            store_pixels(image, strides, pixels, inside, tl.where(won == corner, values, 0.0), C, BLOCK_C)


@triton.jit
def first_pixel(windows, width):
    return windows // width * (4 * width) + windows % width * 2


@triton.jit
def half_squares(k):
    # |k|^2 / 2 of each key: what the score "l2" takes from a product.
    wide = k.to(tl.float32)
    return tl.sum(wide * wide, 1) * 0.5


@triton.jit
def products(x, y):
    return tl.dot(x, tl.trans(y), input_precision="ieee")  # [rows of x, rows of y]


@triton.jit
def pool(
    x, pooled, winner, other, picked, x_strides, pooled_strides, other_strides, channels, windows, width,
    n_channel_blocks, n_window_blocks, CHANNELS: tl.constexpr, WINDOWS: tl.constexpr,
):  # fmt: skip
    # pooled: the largest of each 2x2 window of x, winner: which it was, picked: what other has in its place. As
    # F.max_pool2d has it: the first of equals in row-major order, and the last NaN. winner lies in memory as pooled
    # does, and so does picked.
    window_block = tl.program_id(0) % n_window_blocks
    channel_block = tl.program_id(0) // n_window_blocks % n_channel_blocks
    image = (tl.program_id(0) // n_window_blocks // n_channel_blocks).to(tl.int64)
    w = window_block * WINDOWS + tl.arange(0, WINDOWS)
    c = channel_block * CHANNELS + tl.arange(0, CHANNELS)
    there = (w < windows)[:, None] & (c < channels)[None, :]  # [WINDOWS, CHANNELS]
    first = first_pixel(w, width).to(tl.int64)
    c = c.to(tl.int64)
    x += image * x_strides[0] + c[None, :] * x_strides[1]
    best = tl.load(x + first[:, None] * x_strides[2], mask=there, other=0.0).to(tl.float32)
    won = tl.zeros([WINDOWS, CHANNELS], tl.int8)
    for corner in tl.static_range(1, 4):
        pixels = first + corner // 2 * (2 * width) + corner % 2
        value = tl.load(x + pixels[:, None] * x_strides[2], mask=there, other=0.0).to(tl.float32)
        wins = (value > best) | (value != value)
        best = tl.where(wins, value, best)
        won = tl.where(wins, tl.full([WINDOWS, CHANNELS], corner, tl.int8), won)
    place = image * pooled_strides[0] + w.to(tl.int64)[:, None] * pooled_strides[2] + c[None, :] * pooled_strides[1]
    tl.store(pooled + place, best.to(pooled.dtype.element_ty), mask=there)
    tl.store(winner + place, won, mask=there)
    if other is not None:
        pixels = first[:, None] + (won // 2).to(tl.int64) * (2 * width) + (won % 2).to(tl.int64)
        other += image * other_strides[0] + c[None, :] * other_strides[1]
        tl.store(picked + place, tl.load(other + pixels * other_strides[2], mask=there, other=0.0), mask=there)
