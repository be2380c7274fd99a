"""Minibatch standard deviation on the GPU, in Triton.

A program owns some tiles of one feature of one group: places in a tile times all members of the group, held in
registers from the first look, for the mean, to the second, for the variance. What programs sum for each other goes
through memory to a second launch, which adds it in one order: results are the same every run.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _images, _tuned
from ..._triton import capability, ceil_div, launch, power_of_two
from ..._tuned import Config

#: How each kernel is launched where no table says otherwise; see ``tunable.py``. Not tuned yet.
CONFIGS: dict[str, Config] = {
    "copy_and_sum": {"values": 16, "programs": 8, "num_warps": 4},
    "grad_input": {"values": 16, "programs": 8, "num_warps": 4},
    "fill": {"values": 8, "num_warps": 4},
    "sum_of_statistic": {"values": 8, "num_warps": 4},
}

#: Programs that share a sum, at most; those that read it load as many numbers.
MAX_PARTS = 256


@triton.jit
def _tile(tile, lines, run, LINES: tl.constexpr, RUN: tl.constexpr):
    # LINES lines by RUN numbers of a feature: the line and the number of each place, and whether it is there.
    place = tl.arange(0, LINES * RUN)
    tiles_a_line = tl.cdiv(run, RUN)
    line = tile // tiles_a_line * LINES + place // RUN
    number = tile % tiles_a_line * RUN + place % RUN
    return line, number, (line < lines) & (number < run)  # [PLACES]


@triton.jit
def _pointers(tensor, strides, samples, line, number, f):
    # strides: from image to image, line to line, feature to feature.
    images = tensor + samples.to(tl.int64) * strides[0] + f.to(tl.int64) * strides[2]
    return images[:, None] + (line.to(tl.int64) * strides[1] + number)[None, :]  # [GROUP, PLACES]


@triton.jit
def _deviations(values, there, size):
    # From the mean over the group, and the variance. Absent members and places are 0.
    divisor = size.to(tl.float32)
    mean = tl.div_rn(tl.sum(values, 0), divisor)
    centred = tl.where(there, values - mean[None, :], 0.0)  # [GROUP, PLACES]
    # Beside small deviations the rounding of the mean is not small.
    left = tl.div_rn(tl.sum(centred, 0), divisor)
    centred = tl.where(there, centred - left[None, :], 0.0)
    return centred, tl.div_rn(tl.sum(centred * centred, 0), divisor)


@triton.jit(do_not_specialize=["size"])
def _copy_and_sum(
    x, y, sums, x_strides, y_strides, lines, run, n_tiles, n_parts, groups, n_features, size, eps,
    GROUP: tl.constexpr, LINES: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    # y takes x, and sums[m, f, part] the standard deviations of every n_parts-th tile.
    part = tl.program_id(0) % n_parts
    f = tl.program_id(0) // n_parts % n_features
    m = tl.program_id(0) // n_parts // n_features
    member = tl.arange(0, GROUP)
    samples = member * groups + m
    total = tl.zeros([LINES * RUN], tl.float32)
    for tile in range(part, n_tiles, n_parts):
        line, number, inside = _tile(tile, lines, run, LINES, RUN)
        there = (member < size)[:, None] & inside[None, :]
        values = tl.load(_pointers(x, x_strides, samples, line, number, f), mask=there, other=0.0)
        tl.store(_pointers(y, y_strides, samples, line, number, f), values, mask=there)
        _centred, variance = _deviations(values.to(tl.float32), there, size)
        total += tl.where(inside, tl.sqrt_rn(variance + eps), 0.0)
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _fill(
    y, sums, image_stride, channel_stride, pixel_stride, channels, pixels, n_blocks, n_parts, groups, n_features, count,
    PARTS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    # The statistic to some pixels of one appended channel of one sample.
    block = tl.program_id(0) % n_blocks
    f = tl.program_id(0) // n_blocks % n_features
    n = tl.program_id(0) // n_blocks // n_features
    parts = tl.arange(0, PARTS)
    summed = tl.load(sums + (n % groups * n_features + f) * n_parts + parts, mask=parts < n_parts, other=0.0)
    statistic = (tl.sum(summed, 0) / count).to(y.dtype.element_ty)
    pixel = block.to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    y += n.to(tl.int64) * image_stride + (channels + f).to(tl.int64) * channel_stride
    tl.store(y + pixel * pixel_stride, statistic, mask=pixel < pixels)


@triton.jit
def _sum_of_statistic(
    grad, sums, image_stride, channel_stride, pixel_stride, channels, pixels, n_parts, n_features, PIXELS: tl.constexpr
):
    # sums[n, f, part]: of the gradients of one appended channel, every n_parts-th block of pixels.
    part = tl.program_id(0) % n_parts
    f = tl.program_id(0) // n_parts % n_features
    n = tl.program_id(0) // n_parts // n_features
    grad += n.to(tl.int64) * image_stride + (channels + f).to(tl.int64) * channel_stride
    total = tl.zeros([PIXELS], tl.float32)
    for first in range(part * PIXELS, pixels, n_parts * PIXELS):
        pixel = first + tl.arange(0, PIXELS)
        total += tl.load(grad + pixel.to(tl.int64) * pixel_stride, mask=pixel < pixels, other=0.0).to(tl.float32)
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=["size"])
def _grad_input(
    grad, x, dx, sums, grad_strides, x_strides, dx_strides, lines, run, n_tiles, n_programs, n_parts, groups,
    n_features, size, count, eps, GROUP: tl.constexpr, LINES: tl.constexpr, RUN: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0) % n_programs
    f = tl.program_id(0) // n_programs % n_features
    m = tl.program_id(0) // n_programs // n_features
    member = tl.arange(0, GROUP)
    samples = member * groups + m
    # Member by member, each in the order of its parts.
    share = 0.0
    for g in range(size):
        parts = tl.arange(0, PARTS)
        of_member = sums + ((g * groups + m) * n_features + f).to(tl.int64) * n_parts + parts
        share += tl.sum(tl.load(of_member, mask=parts < n_parts, other=0.0), 0)
    share = share / size / count
    for tile in range(program, n_tiles, n_programs):
        line, number, inside = _tile(tile, lines, run, LINES, RUN)
        there = (member < size)[:, None] & inside[None, :]
        values = tl.load(_pointers(x, x_strides, samples, line, number, f), mask=there, other=0.0).to(tl.float32)
        copied = tl.load(_pointers(grad, grad_strides, samples, line, number, f), mask=there, other=0.0).to(tl.float32)
        centred, variance = _deviations(values, there, size)
        out = copied + centred * tl.div_rn(share, tl.sqrt_rn(variance + eps))[None, :]
        tl.store(_pointers(dx, dx_strides, samples, line, number, f), out.to(dx.dtype.element_ty), mask=there)


class Plan(NamedTuple):
    """How a call is cut into programs.

    Attributes:
        lines, run: a feature of one image is so many lines of so many numbers.
        n_tiles: tiles of a feature of one group.
        n_programs: that share them.
        constants: what the kernels are compiled for.
    """

    size: int
    groups: int
    lines: int
    run: int
    n_tiles: int
    n_programs: int
    constants: dict[str, int]


def _config(kernel: str, device: torch.device, *key: int) -> Config:
    return _tuned.configuration(capability(device), "minibatch_stddev", kernel, key, CONFIGS[kernel])


def plan(kernel: str, x: Tensor, group_size: int, num_features: int, last: bool, joined: bool) -> Plan:
    samples, channels, pixels = _images.shape(x)
    size, width = min(group_size, samples), channels // num_features
    # With whole channels next to each other in every tensor a feature is one line.
    lines, run = (pixels, width) if last else (1, width * pixels) if joined else (width, pixels)
    config = _config(kernel, x.device, power_of_two(size), min(power_of_two(run), 4096), x.element_size())
    wanted = config["programs"] * _multiprocessors(x.device)
    return _plan(samples, size, num_features, lines, run, wanted, config["values"], config["num_warps"])


@functools.lru_cache(maxsize=1024)
def _plan(
    samples: int, size: int, num_features: int, lines: int, run: int, programs: int, values: int, num_warps: int
) -> Plan:
    padded, groups = power_of_two(size), samples // size
    places = max(1, 32 * num_warps * values // padded)
    run_block = min(places, power_of_two(run))
    line_block = min(places // run_block, power_of_two(lines))
    n_tiles = ceil_div(lines, line_block) * ceil_div(run, run_block)
    wanted = ceil_div(programs, groups * num_features)
    constants = {"GROUP": padded, "LINES": line_block, "RUN": run_block, "num_warps": num_warps}
    return Plan(size, groups, lines, run, n_tiles, min(n_tiles, wanted, MAX_PARTS), constants)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # For the interpreter few, so that in tests a sum is shared by several programs and a program has several tiles.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _lines(tensors: tuple[Tensor, ...], last: bool) -> tuple[list[_images.Lines], bool]:
    lines = [_images.lines(t, last) for t in tensors]
    pixels = math.prod(tensors[0].shape[2:])
    return lines, not last and all(line.line == pixels for line in lines)


def _strides(line: _images.Lines, width: int, last: bool) -> tuple[int, int, int]:
    """From image to image, line to line, feature to feature."""
    return line.image, line.line, width if last else width * line.line


def _channel_strides(line: _images.Lines, last: bool) -> tuple[int, int, int]:
    """From image to image, channel to channel, pixel to pixel."""
    return (line.image, 1, line.line) if last else (line.image, line.line, 1)


def _pixels(kernel: str, x: Tensor, pixels: int, last: bool) -> dict[str, int]:
    """The pixels of a channel that a program takes at once, and its warps."""
    key = min(power_of_two(pixels), 4096), int(last), x.element_size()
    config = _config(kernel, x.device, *key)
    num_warps = config["num_warps"]
    return {"PIXELS": 32 * num_warps * config["values"], "num_warps": num_warps}


def forward(y: Tensor, x: Tensor, group_size: int, num_features: int, eps: float, backend: str) -> None:
    samples, channels, pixels = _images.shape(x)
    if samples == 0:
        return
    last, width = _images.channels_last(x), channels // num_features
    (source, target), joined = _lines((x, y), last)
    cut = plan("copy_and_sum", x, group_size, num_features, last, joined)
    programs = cut.groups * num_features * cut.n_programs
    sums = torch.empty(programs, dtype=torch.float32, device=x.device)
    launch(
        _copy_and_sum, programs, x.device, source.tensor, y, sums,
        _strides(source, width, last), _strides(target, width, last),
        cut.lines, cut.run, cut.n_tiles, cut.n_programs, cut.groups, num_features, cut.size, eps, **cut.constants,
    )  # fmt: skip
    constants = _pixels("fill", y, pixels, last)
    n_blocks = ceil_div(pixels, constants["PIXELS"])
    launch(
        _fill, samples * num_features * n_blocks, x.device, y, sums, *_channel_strides(target, last),
        channels, pixels, n_blocks, cut.n_programs, cut.groups, num_features, width * pixels,
        PARTS=MAX_PARTS, **constants,
    )  # fmt: skip


def backward(dx: Tensor, grad: Tensor, x: Tensor, group_size: int, num_features: int, eps: float, backend: str) -> None:
    samples, channels, pixels = _images.shape(x)
    if samples == 0:
        return
    last, width = _images.channels_last(x), channels // num_features
    (given, source, target), joined = _lines((grad, x, dx), last)
    constants = _pixels("sum_of_statistic", grad, pixels, last)
    n_parts = min(ceil_div(pixels, constants["PIXELS"]), MAX_PARTS)
    sums = torch.empty(samples, num_features, n_parts, dtype=torch.float32, device=x.device)
    launch(
        _sum_of_statistic, sums.numel(), x.device, given.tensor, sums, *_channel_strides(given, last),
        channels, pixels, n_parts, num_features, **constants,
    )  # fmt: skip
    cut = plan("grad_input", x, group_size, num_features, last, joined)
    launch(
        _grad_input, cut.groups * num_features * cut.n_programs, x.device, given.tensor, source.tensor, dx, sums,
        *(_strides(line, width, last) for line in (given, source, target)),
        cut.lines, cut.run, cut.n_tiles, cut.n_programs, n_parts, cut.groups, num_features, cut.size, width * pixels,
        eps, **cut.constants, PARTS=MAX_PARTS,
    )  # fmt: skip
