"""Conditional batch norm on the GPU, in Triton.

A tile is channels by pixels. Images lie planar or channels last by their strides alone: one of them is 1, for which
Triton compiles a variant, and along that dimension threads load neighbouring numbers. Sums run over a tile's pixels. A
program walks tiles of one image and writes its part of the sums; parts are added in one order, so that results are the
same every run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _images, _tuned
from ..._triton import capability, launch
from ..._tuned import Config
from .passes import Term

#: How each kernel is launched where no table says otherwise; see ``tunable.py``. A thread loads 16 values of each
#: tensor, in four instructions of 16 bytes for float32; of three tensors 8, for on sm_80 so many would spill. Where
#: channels are last, 64 of 16 bits fill whole cache lines. Not yet timed on any GPU.
CONFIGS: dict[str, Config] = {
    "moments": {"values": 16, "channels": 64, "programs": 8, "num_warps": 4},
    "sums": {"values": 16, "channels": 64, "programs": 8, "num_warps": 4},
    "double_sums": {"values": 8, "channels": 64, "programs": 8, "num_warps": 4},
    "combine": {"values": 16, "channels": 64, "num_warps": 4},
    "merge": {"parts": 128, "channels": 16, "num_warps": 4},
}


@triton.jit
def _tile(x_ptr, n, stride_n, stride_c, stride_p, channel, pixel, keep):
    offset = channel.to(tl.int64)[:, None] * stride_c + pixel.to(tl.int64)[None, :] * stride_p
    return tl.load(x_ptr + n.to(tl.int64) * stride_n + offset, mask=keep, other=0).to(tl.float32)  # [BC, BP]


@triton.jit
def _program(channels, splits, BC: tl.constexpr):
    """The image, channels and split of a program; splits of a plane run next to each other."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(channels, BC)
    return pid // splits // blocks, pid // splits % blocks * BC + tl.arange(0, BC), pid % splits


@triton.jit
def _moments(
    x_ptr, parts_ptr, step, channels, pixels, splits, tiles_a_split, stride_n, stride_c, stride_p,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # parts [4, parts, C], in steps of step: count; a shift, the first tile's mean as it is rounded; mean less shift;
    # sum of squares about the mean. So means keep the digits that deviations have, and nothing that cancels is squared.
    n, channel, split = _program(channels, splits, BC)
    keep_channel = channel < channels
    count = 0.0
    shift = tl.zeros([BC], tl.float32)
    mean = tl.zeros([BC], tl.float32)
    squares = tl.zeros([BC], tl.float32)
    for tile in range(split * tiles_a_split, tl.minimum((split + 1) * tiles_a_split, tl.cdiv(pixels, BP))):
        pixel = tile * BP + tl.arange(0, BP)
        keep = keep_channel[:, None] & (pixel < pixels)[None, :]
        x = _tile(x_ptr, n, stride_n, stride_c, stride_p, channel, pixel, keep)
        size = tl.minimum(pixels - tile * BP, BP).to(tl.float32)
        shift = tl.where(count == 0, tl.sum(x, 1) / size, shift)
        x = tl.where(keep, x - shift[:, None], 0)
        tile_mean = tl.sum(x, 1) / size
        rest = tl.where(keep, x - tile_mean[:, None], 0)
        total = count + size
        delta = tile_mean - mean
        mean += delta * (size / total)
        squares += tl.sum(rest * rest, 1) + delta * delta * (count * size / total)
        count = total
    part = parts_ptr + (n * splits + split).to(tl.int64) * channels + channel
    tl.store(part, count + tl.zeros([BC], tl.float32), mask=keep_channel)
    tl.store(part + step, shift, mask=keep_channel)
    tl.store(part + 2 * step, mean, mask=keep_channel)
    tl.store(part + 3 * step, squares, mask=keep_channel)


@triton.jit
def _merge(parts_ptr, out_ptr, n_parts, step, channels, BR: tl.constexpr, BC: tl.constexpr):
    # out [2, C]: mean, sum of squares about it. Here means are less the first part's shift.
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    keep_channel = channel < channels
    first = tl.load(parts_ptr + step + channel, mask=keep_channel, other=0)
    count = tl.zeros([BC], tl.float32)
    mean = tl.zeros([BC], tl.float32)
    squares = tl.zeros([BC], tl.float32)
    for start in range(0, n_parts, BR):
        part = start + tl.arange(0, BR)
        keep = keep_channel[:, None] & (part < n_parts)[None, :]
        at = parts_ptr + part.to(tl.int64)[None, :] * channels + channel[:, None]
        counts = tl.load(at, mask=keep, other=0)  # [BC, BR]
        means = tl.load(at + step, mask=keep, other=0) - first[:, None] + tl.load(at + 2 * step, mask=keep, other=0)
        size = tl.sum(counts, 1)
        total = count + size
        here = tl.sum(counts * means, 1) / tl.maximum(size, 1)
        apart = means - here[:, None]
        delta = here - mean
        share = size / tl.maximum(total, 1)
        squares += tl.sum(tl.load(at + 3 * step, mask=keep, other=0) + counts * apart * apart, 1)
        squares += delta * delta * count * share
        mean += delta * share
        count = total
    tl.store(out_ptr + channel, first + mean, mask=keep_channel)
    tl.store(out_ptr + channels + channel, squares, mask=keep_channel)


@triton.jit
def _sums(
    v_ptr, grad_ptr, x_ptr, mean_ptr, parts_ptr, step, channels, pixels, splits, tiles_a_split,
    v_n, v_c, v_p, grad_n, grad_c, grad_p, x_n, x_c, x_p,
    HAS_V: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # parts [2 or 5, parts, C]: of grad, grad (x - mean), v, v (x - mean), v grad.
    n, channel, split = _program(channels, splits, BC)
    keep_channel = channel < channels
    mean = tl.load(mean_ptr + channel, mask=keep_channel, other=0)
    s_g = tl.zeros([BC], tl.float32)
    s_gx = tl.zeros([BC], tl.float32)
    s_v = tl.zeros([BC], tl.float32)
    s_vx = tl.zeros([BC], tl.float32)
    s_vg = tl.zeros([BC], tl.float32)
    for tile in range(split * tiles_a_split, tl.minimum((split + 1) * tiles_a_split, tl.cdiv(pixels, BP))):
        pixel = tile * BP + tl.arange(0, BP)
        keep = keep_channel[:, None] & (pixel < pixels)[None, :]
        x = _tile(x_ptr, n, x_n, x_c, x_p, channel, pixel, keep) - mean[:, None]  # grad and v are 0 where it is none
        grad = _tile(grad_ptr, n, grad_n, grad_c, grad_p, channel, pixel, keep)
        s_g += tl.sum(grad, 1)
        s_gx += tl.sum(grad * x, 1)
        if HAS_V:
            v = _tile(v_ptr, n, v_n, v_c, v_p, channel, pixel, keep)
            s_v += tl.sum(v, 1)
            s_vx += tl.sum(v * x, 1)
            s_vg += tl.sum(v * grad, 1)
    part = parts_ptr + (n * splits + split).to(tl.int64) * channels + channel
    tl.store(part, s_g, mask=keep_channel)
    tl.store(part + step, s_gx, mask=keep_channel)
    if HAS_V:
        tl.store(part + 2 * step, s_v, mask=keep_channel)
        tl.store(part + 3 * step, s_vx, mask=keep_channel)
        tl.store(part + 4 * step, s_vg, mask=keep_channel)


@triton.jit
def _plane(ptr, n, image, channel, keep):
    return tl.load(ptr + n.to(tl.int64) * image + channel, mask=keep, other=0)[:, None]  # [BC, 1]


@triton.jit
def _combine(
    a_ptr, b_ptr, x_ptr, out_ptr, a_weight, b_weight, x_weight, offset_ptr, mean_ptr,
    a_image, b_image, x_image, offset_image, channels, pixels, tiles,
    a_n, a_c, a_p, b_n, b_c, b_p, x_n, x_c, x_p, out_n, out_c, out_p,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, HAS_X: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    n, channel, tile = _program(channels, tiles, BC)
    pixel = tile * BP + tl.arange(0, BP)
    keep_channel = channel < channels
    keep = keep_channel[:, None] & (pixel < pixels)[None, :]
    out = tl.zeros([BC, BP], tl.float32) + _plane(offset_ptr, n, offset_image, channel, keep_channel)
    if HAS_A:
        a = _tile(a_ptr, n, a_n, a_c, a_p, channel, pixel, keep)
        out += _plane(a_weight, n, a_image, channel, keep_channel) * a
    if HAS_B:
        b = _tile(b_ptr, n, b_n, b_c, b_p, channel, pixel, keep)
        out += _plane(b_weight, n, b_image, channel, keep_channel) * b
    if HAS_X:
        x = _tile(x_ptr, n, x_n, x_c, x_p, channel, pixel, keep)
        x -= tl.load(mean_ptr + channel, mask=keep_channel, other=0)[:, None]
        out += _plane(x_weight, n, x_image, channel, keep_channel) * x
    place = channel.to(tl.int64)[:, None] * out_c + pixel.to(tl.int64)[None, :] * out_p
    tl.store(out_ptr + n.to(tl.int64) * out_n + place, out.to(out_ptr.dtype.element_ty), mask=keep)


class _Grid(NamedTuple):
    """How an image is cut.

    Attributes:
        programs: images times blocks of channels times splits.
        splits: programs that share an image's pixels.
        tiles_a_split: tiles that a program walks.
        constants: what the kernel is compiled for.
    """

    programs: int
    splits: int
    tiles_a_split: int
    constants: dict[str, int]


def moments(x: Tensor, last: bool) -> Tensor:
    n, channels, pixels = _images.shape(x)
    grid = _grid("moments", x, last)
    n_parts, step = n * grid.splits, n * grid.splits * channels
    parts = torch.empty(4, n_parts, channels, dtype=torch.float32, device=x.device)
    out = torch.empty(2, channels, dtype=torch.float32, device=x.device)
    launch(
        _moments, grid.programs, x.device, x, parts, step, channels, pixels, grid.splits, grid.tiles_a_split,
        *_strides(x, last), **grid.constants,
    )  # fmt: skip
    config = _config("merge", x.device, min(triton.next_power_of_2(n_parts), 512))
    launch(
        _merge, triton.cdiv(channels, config["channels"]), x.device, parts, out, n_parts, step, channels,
        BR=config["parts"], BC=config["channels"], num_warps=config["num_warps"],
    )  # fmt: skip
    return out


def sums(v: Tensor | None, grad: Tensor, x: Tensor, mean: Tensor, last: bool) -> Tensor:
    n, channels, pixels = _images.shape(x)
    grid = _grid("sums" if v is None else "double_sums", x, last)
    n_parts, count = n * grid.splits, 2 if v is None else 5
    parts = torch.empty(count, n_parts, channels, dtype=torch.float32, device=x.device)
    strides = [s for t in (grad if v is None else v, grad, x) for s in _strides(t, last)]
    launch(
        _sums, grid.programs, x.device, grad if v is None else v, grad, x, mean, parts, n_parts * channels, channels,
        pixels, grid.splits, grid.tiles_a_split, *strides, HAS_V=v is not None, **grid.constants,
    )  # fmt: skip
    return parts if grid.splits == 1 else parts.view(count, n, grid.splits, channels).sum(2)


def combine(out: Tensor, others: Sequence[Term], x: Term | None, mean: Tensor, offset: Tensor, last: bool) -> None:
    _, channels, pixels = _images.shape(out)
    grid = _grid("combine", out, last, len(others) + (x is not None))
    unused = out, mean
    terms = [*others, *[unused] * (2 - len(others)), x or unused]
    weights = [weight.contiguous() for weight in (*(weight for _, weight in terms), offset)]
    strides = [s for t in (*(t for t, _ in terms), out) for s in _strides(t, last)]
    launch(
        _combine, grid.programs, out.device,
        *(t for t, _ in terms), out, *weights, mean, *(w.shape[1] if w.dim() == 2 else 0 for w in weights),
        channels, pixels, grid.splits, *strides,
        HAS_A=len(others) > 0, HAS_B=len(others) > 1, HAS_X=x is not None, **grid.constants,
    )  # fmt: skip


def _config(kernel: str, device: torch.device, *key: int) -> Config:
    return _tuned.configuration(capability(device), "conditional_batch_norm", kernel, key, CONFIGS[kernel])


def _grid(kernel: str, x: Tensor, last: bool, *more_key: int) -> _Grid:
    """How to cut an image: among as many programs as the kernel's configuration wants, or a tile to each."""
    n, channels, pixels = _images.shape(x)
    key = min(triton.next_power_of_2(pixels), 4096), int(last), x.element_size(), *more_key
    config = _config(kernel, x.device, *key)
    num_warps = config["num_warps"]
    tile = 32 * num_warps * config["values"]
    if last:
        bc = min(triton.next_power_of_2(channels), config["channels"])
        bp = min(triton.next_power_of_2(pixels), tile // bc)
    else:
        bp = min(triton.next_power_of_2(pixels), tile)
        bc = min(triton.next_power_of_2(channels), tile // bp)
    planes, tiles = n * triton.cdiv(channels, bc), triton.cdiv(pixels, bp)
    wanted = tiles
    if "programs" in config:
        wanted = min(tiles, triton.cdiv(config["programs"] * _multiprocessors(x.device), planes))
    tiles_a_split = triton.cdiv(tiles, wanted)
    splits = triton.cdiv(tiles, tiles_a_split)
    return _Grid(planes * splits, splits, tiles_a_split, {"BP": bp, "BC": bc, "num_warps": num_warps})


def _strides(x: Tensor, last: bool) -> tuple[int, int, int]:
    """From image to image, from channel to channel, from pixel to pixel."""
    lines = _images.lines(x, last)
    return (lines.image, 1, lines.line) if last else (lines.image, lines.line, 1)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # For the interpreter few, so that in tests an image may be split or not.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
