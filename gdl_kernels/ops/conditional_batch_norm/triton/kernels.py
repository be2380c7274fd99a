"""The passes of conditional batch norm on the GPU, in Triton: three kernels, of which all its derivatives are made.

A tile is channels by pixels. Images lie planar or channels last by their strides alone: one of them is 1, for which
Triton compiles a variant, and along that dimension threads load neighbouring numbers. Sums run over a tile's pixels. A
program walks tiles of one image and writes its part of the sums; parts are added in one order (``between``), so that
results are the same every run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .... import _images, _tuned
from ...._images import Lines
from ...._triton import capability, ceil_div, launch, power_of_two
from ...._tuned import Config

#: A tensor and its weights, ``(N, C)`` or ``(C,)``.
Term = tuple[Lines, Tensor]

#: How each kernel is launched where no table says otherwise; see ``tunable.py``. A thread loads 16 values of each
#: tensor, in four instructions of 16 bytes for float32; of three tensors 8, for on sm_80 so many would spill. Where
#: channels are last, 64 of 16 bits fill whole cache lines. Not tuned yet.
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
def inverse_root(x):
    return tl.div_rn(tl.full(x.shape, 1, tl.float32), tl.sqrt_rn(x))


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
def _sums(
    v_ptr, grad_ptr, x_ptr, mean_ptr, parts_ptr, step, channels, pixels, splits, tiles_a_split,
    v_n, v_c, v_p, grad_n, grad_c, grad_p, x_n, x_c, x_p, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # parts [2, parts, C], with v [5, parts, C], in steps of step: of grad, grad (x - mean), v, v (x - mean), v grad.
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
        if v_ptr is not None:
            v = _tile(v_ptr, n, v_n, v_c, v_p, channel, pixel, keep)
            s_v += tl.sum(v, 1)
            s_vx += tl.sum(v * x, 1)
            s_vg += tl.sum(v * grad, 1)
    part = parts_ptr + (n * splits + split).to(tl.int64) * channels + channel
    tl.store(part, s_g, mask=keep_channel)
    tl.store(part + step, s_gx, mask=keep_channel)
    if v_ptr is not None:
        tl.store(part + 2 * step, s_v, mask=keep_channel)
        tl.store(part + 3 * step, s_vx, mask=keep_channel)
        tl.store(part + 4 * step, s_vg, mask=keep_channel)


@triton.jit
def _plane(ptr, n, image, channel, keep):
    return tl.load(ptr + n.to(tl.int64) * image + channel, mask=keep, other=0).to(tl.float32)  # [BC]


@triton.jit
def _combine(
    a_ptr, b_ptr, x_ptr, out_ptr, a_weight, b_weight, x_weight, offset_ptr, statistics_ptr, mean_ptr, var_ptr, eps,
    a_image, b_image, x_image, offset_image, channels, pixels, tiles,
    a_n, a_c, a_p, b_n, b_c, b_p, x_n, x_c, x_p, out_n, out_c, out_p, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # rstd (a_weight a + b_weight b + x_weight (x - mean)) + offset, of which any may be None.
    n, channel, tile = _program(channels, tiles, BC)
    pixel = tile * BP + tl.arange(0, BP)
    keep_channel = channel < channels
    keep = keep_channel[:, None] & (pixel < pixels)[None, :]
    if var_ptr is None:
        mean = tl.load(statistics_ptr + channel, mask=keep_channel, other=0)
        rstd = tl.load(statistics_ptr + channels + channel, mask=keep_channel, other=0)
    else:  # no kernel has been here: one program of a channel writes its statistics too
        mean = tl.load(mean_ptr + channel, mask=keep_channel, other=0).to(tl.float32)
        var = tl.load(var_ptr + channel, mask=keep_channel, other=0).to(tl.float32)
        rstd = inverse_root(var + eps)
        first = keep_channel & (n == 0) & (tile == 0)
        tl.store(statistics_ptr + channel, mean, mask=first)
        tl.store(statistics_ptr + channels + channel, rstd, mask=first)
        tl.store(statistics_ptr + 2 * channels + channel, var, mask=first)
    out = tl.zeros([BC, BP], tl.float32)
    if offset_ptr is not None:
        out += _plane(offset_ptr, n, offset_image, channel, keep_channel)[:, None]
    if a_ptr is not None:
        weight = rstd * _plane(a_weight, n, a_image, channel, keep_channel)
        out += weight[:, None] * _tile(a_ptr, n, a_n, a_c, a_p, channel, pixel, keep)
    if b_ptr is not None:
        weight = rstd * _plane(b_weight, n, b_image, channel, keep_channel)
        out += weight[:, None] * _tile(b_ptr, n, b_n, b_c, b_p, channel, pixel, keep)
    if x_ptr is not None:
        weight = rstd * _plane(x_weight, n, x_image, channel, keep_channel)
        out += weight[:, None] * (_tile(x_ptr, n, x_n, x_c, x_p, channel, pixel, keep) - mean[:, None])
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


# The launchers: images are in lines for ``last`` (see gdl_kernels/_images.py), and not empty.


def moments(x: Lines, last: bool) -> Tensor:
    """``(4, N, splits, C)``: parts of each channel's moments, see ``_moments``."""
    n, channels, pixels = _images.shape(x.tensor)
    grid = _grid("moments", x.tensor, last)
    parts = x.tensor.new_empty(4, n, grid.splits, channels, dtype=torch.float32)
    launch(
        _moments, grid.programs, parts.device, x.tensor, parts, parts.stride(0), channels, pixels, grid.splits,
        grid.tiles_a_split, *_strides(x, last), **grid.constants,
    )  # fmt: skip
    return parts


def sums(v: Lines | None, grad: Lines, x: Lines, statistics: Tensor, last: bool) -> Tensor:
    """``(2, N, splits, C)``: parts of sums of grad, grad (x - mean). With ``v`` 5: also of v, v (x - mean), v grad."""
    n, channels, pixels = _images.shape(x.tensor)
    grid = _grid("sums" if v is None else "double_sums", x.tensor, last)
    parts = statistics.new_empty(2 if v is None else 5, n, grid.splits, channels)
    launch(
        _sums, grid.programs, parts.device, _tensor(v), grad.tensor, x.tensor, statistics, parts, parts.stride(0),
        channels, pixels, grid.splits, grid.tiles_a_split, *_strides(v, last), *_strides(grad, last),
        *_strides(x, last), **grid.constants,
    )  # fmt: skip
    return parts


def combine(
    out: Tensor,
    others: Sequence[Term],
    x: Term | None,
    offset: Tensor | None,
    statistics: Tensor,
    last: bool,
    given: tuple[Tensor, Tensor, float] | None = None,
) -> None:
    """The sum of weight * tensor over ``others`` and of weight * (x - mean), times rstd, and ``offset``.

    Args:
        offset: ``(N, C)`` or ``(C,)``; None is 0.
        statistics: ``(3, C)``, mean and rstd first.
        given: mean, variance and eps, of which ``statistics`` are written.
    """
    _, channels, pixels = _images.shape(out)
    grid = _grid("combine", out, last, len(others) + (x is not None))
    terms: list[Term | tuple[None, None]] = [*others, *[(None, None)] * (2 - len(others)), x or (None, None)]
    weights = [rows(weight) for weight in (*(weight for _, weight in terms), offset)]
    mean, var, eps = given or (None, None, 0.0)
    strides = [stride for t in (*(t for t, _ in terms), _images.lines(out, last)) for stride in _strides(t, last)]
    launch(
        _combine, grid.programs, out.device,
        *(_tensor(t) for t, _ in terms), out, *(weight for weight, _ in weights), statistics, mean, var, eps,
        *(image for _, image in weights), channels, pixels, grid.splits, *strides, **grid.constants,
    )  # fmt: skip


def rows(weight: Tensor | None) -> tuple[Tensor | None, int]:
    """Numbers of planes or of channels, channels next to each other, and the stride from image to image."""
    if weight is None or weight.dim() == 1:
        return weight, 0
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    return weight, weight.stride(0)


def _tensor(x: Lines | None) -> Tensor | None:
    return None if x is None else x.tensor


def configuration(kernel: str, device: torch.device, *key: int) -> Config:
    return _tuned.configuration(capability(device), "conditional_batch_norm", kernel, key, CONFIGS[kernel])


def _grid(kernel: str, x: Tensor, last: bool, *more_key: int) -> _Grid:
    """How to cut an image: among as many programs as the kernel's configuration wants, or a tile to each."""
    n, channels, pixels = _images.shape(x)
    key = min(power_of_two(pixels), 4096), int(last), x.element_size(), *more_key
    config = configuration(kernel, x.device, *key)
    num_warps = config["num_warps"]
    tile = 32 * num_warps * config["values"]
    if last:
        bc = min(power_of_two(channels), config["channels"])
        bp = min(power_of_two(pixels), tile // bc)
    else:
        bp = min(power_of_two(pixels), tile)
        bc = min(power_of_two(channels), tile // bp)
    planes, tiles = n * ceil_div(channels, bc), ceil_div(pixels, bp)
    wanted = tiles
    if "programs" in config:
        wanted = min(tiles, ceil_div(config["programs"] * _multiprocessors(x.device), planes))
    tiles_a_split = ceil_div(tiles, wanted)
    splits = ceil_div(tiles, tiles_a_split)
    return _Grid(planes * splits, splits, tiles_a_split, {"BP": bp, "BC": bc, "num_warps": num_warps})


def _strides(x: Lines | None, last: bool) -> tuple[int, int, int]:
    """From image to image, from channel to channel, from pixel to pixel."""
    if x is None:
        return 0, 0, 0
    return (x.image, 1, x.line) if last else (x.image, x.line, 1)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # For the interpreter few, so that in tests an image may be split or not.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
