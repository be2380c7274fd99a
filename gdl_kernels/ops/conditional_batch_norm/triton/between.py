"""What lies between two passes of conditional batch norm on the GPU, in Triton: small kernels on small numbers.

They add the parts that a pass leaves, ``(N, splits, C)``, and make of them what the next pass needs: numbers of planes
``(N, C)`` and of channels ``(C,)``, in float32. ``r = rstd``; ``xhat = (x - mean) r``; ``m(t)`` is a channel's mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ...._triton import ceil_div, launch, power_of_two
from ...._tuned import Config
from .kernels import configuration, inverse_root, rows

#: Planes of a program of ``_weights``.
PLANES = 512


@triton.jit
def _merge(parts_ptr, statistics_ptr, n_parts, step, channels, eps, BR: tl.constexpr, BC: tl.constexpr):
    # parts: see _moments. statistics [3, C]: mean, rstd, unbiased variance. Here means are less the first part's shift.
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    keep_channel = channel < channels
    first = tl.load(parts_ptr + step + channel, mask=keep_channel & (n_parts > 0), other=0)
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
    rstd = inverse_root(tl.div_rn(squares, tl.maximum(count, 1)) + eps)
    tl.store(statistics_ptr + channel, first + mean, mask=keep_channel)
    tl.store(statistics_ptr + channels + channel, rstd, mask=keep_channel)
    tl.store(statistics_ptr + 2 * channels + channel, tl.div_rn(squares, tl.maximum(count - 1, 1)), mask=keep_channel)


@triton.jit
def _added(parts_ptr, image, channel, keep, splits, channels, BN: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr):
    total = tl.zeros([BN, BC], tl.float32)
    for start in range(0, splits, BS):
        split = start + tl.arange(0, BS)
        part = image.to(tl.int64)[:, None] * splits + split[None, :]
        at = part[:, :, None] * channels + channel[None, None, :]
        there = keep[:, None, :] & (split < splits)[None, :, None]
        total += tl.sum(tl.load(parts_ptr + at, mask=there, other=0), 1)
    return total


@triton.jit
def _rows(ptr, image, stride, channel, keep):
    return tl.load(ptr + image.to(tl.int64)[:, None] * stride + channel[None, :], mask=keep, other=0).to(tl.float32)


@triton.jit
def _add(
    parts_ptr, statistics_ptr, gain_ptr, v_gain_ptr, g_ptr, gx_ptr, vg_ptr, means_ptr,
    images, splits, step, channels, count, gain_image, v_gain_image,
    BN: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    # Sums of planes, of which any may be None, [N, C]: g, g xhat, r v g. means [2, C] or, with v_gain, [7, C]:
    # -r m(gain g), -r m(gain g xhat); m(v), m(v xhat), r m(gain v g), m(v_gain g), m(v_gain g xhat).
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    keep_channel = channel < channels
    rstd = tl.load(statistics_ptr + channels + channel, mask=keep_channel, other=0)
    m_g = tl.zeros([BC], tl.float32)
    m_gx = tl.zeros([BC], tl.float32)
    m_v = tl.zeros([BC], tl.float32)
    m_vx = tl.zeros([BC], tl.float32)
    m_vg = tl.zeros([BC], tl.float32)
    m_t = tl.zeros([BC], tl.float32)
    m_tx = tl.zeros([BC], tl.float32)
    for start in range(0, images, BN):
        image = start + tl.arange(0, BN)
        keep = (image < images)[:, None] & keep_channel[None, :]
        plane = image.to(tl.int64)[:, None] * channels + channel[None, :]
        if vg_ptr is not None:
            vg = rstd[None, :] * _added(parts_ptr + 4 * step, image, channel, keep, splits, channels, BN, BS, BC)
            tl.store(vg_ptr + plane, vg.to(vg_ptr.dtype.element_ty), mask=keep)
        if g_ptr is not None:
            g = _added(parts_ptr, image, channel, keep, splits, channels, BN, BS, BC)
            gx = rstd[None, :] * _added(parts_ptr + step, image, channel, keep, splits, channels, BN, BS, BC)
            tl.store(g_ptr + plane, g.to(g_ptr.dtype.element_ty), mask=keep)
            tl.store(gx_ptr + plane, gx.to(gx_ptr.dtype.element_ty), mask=keep)
        if means_ptr is not None:
            gain = _rows(gain_ptr, image, gain_image, channel, keep)
            m_g += tl.sum(gain * g, 0)
            m_gx += tl.sum(gain * gx, 0)
            if v_gain_ptr is not None:
                v_gain = _rows(v_gain_ptr, image, v_gain_image, channel, keep)
                m_v += tl.sum(_added(parts_ptr + 2 * step, image, channel, keep, splits, channels, BN, BS, BC), 0)
                m_vx += tl.sum(_added(parts_ptr + 3 * step, image, channel, keep, splits, channels, BN, BS, BC), 0)
                m_vg += tl.sum(gain * vg, 0)
                m_t += tl.sum(v_gain * g, 0)
                m_tx += tl.sum(v_gain * gx, 0)
    if means_ptr is not None:
        mean = means_ptr + channel
        tl.store(mean, -rstd * (m_g / count), mask=keep_channel)
        tl.store(mean + channels, -rstd * (m_gx / count), mask=keep_channel)
        if v_gain_ptr is not None:
            tl.store(mean + 2 * channels, m_v / count, mask=keep_channel)
            tl.store(mean + 3 * channels, rstd * m_vx / count, mask=keep_channel)
            tl.store(mean + 4 * channels, m_vg / count, mask=keep_channel)
            tl.store(mean + 5 * channels, m_t / count, mask=keep_channel)
            tl.store(mean + 6 * channels, m_tx / count, mask=keep_channel)


@triton.jit
def _weights(
    planes_ptr, means_ptr, statistics_ptr, gain_ptr, v_gain_ptr, v_bias_ptr, of_gain_ptr, of_grad_ptr, of_x_ptr,
    step, channels, gain_image, v_gain_image, v_bias_image, BLOCK: tl.constexpr,
):  # fmt: skip
    # Reads what _add has written, planes [3, N, C]. Writes of_gain [N, C]; of_grad [2, N, C] and of_x [2, C]: the
    # weight of xhat, and the offset.
    plane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = plane < step
    n, channel = plane // channels, plane % channels
    rstd = tl.load(statistics_ptr + channels + channel, mask=keep, other=0)
    mean = means_ptr + channel
    r_g = tl.load(mean, mask=keep, other=0)
    r_gx = tl.load(mean + channels, mask=keep, other=0)
    m_v = tl.load(mean + 2 * channels, mask=keep, other=0)
    m_vx = tl.load(mean + 3 * channels, mask=keep, other=0)
    g = tl.load(planes_ptr + plane, mask=keep, other=0)
    gx = tl.load(planes_ptr + step + plane, mask=keep, other=0)
    vg = tl.load(planes_ptr + 2 * step + plane, mask=keep, other=0)
    scale = rstd * tl.load(gain_ptr + n * gain_image + channel, mask=keep, other=0).to(tl.float32)
    v_gain = tl.load(v_gain_ptr + n * v_gain_image + channel, mask=keep, other=0).to(tl.float32)
    v_bias = tl.load(v_bias_ptr + n * v_bias_image + channel, mask=keep, other=0).to(tl.float32)
    tl.store(of_gain_ptr + plane, (vg - rstd * (m_v * g + m_vx * gx)).to(of_gain_ptr.dtype.element_ty), mask=keep)
    tl.store(of_grad_ptr + plane, v_gain - scale * m_vx, mask=keep)
    tl.store(of_grad_ptr + step + plane, v_bias - scale * m_v, mask=keep)
    # t = (v_gain - gain r m(v xhat)) g - r m(gain g xhat) v is what xhat gets, r gets the spread.
    r_vg = tl.load(mean + 4 * channels, mask=keep, other=0)
    m_t = tl.load(mean + 5 * channels, mask=keep, other=0)
    m_tx = tl.load(mean + 6 * channels, mask=keep, other=0)
    t_mean = m_t + r_gx * m_v + r_g * m_vx
    t_x = m_tx + 2 * r_gx * m_vx
    r_spread = r_vg + r_g * m_v + r_gx * m_vx
    once = keep & (n == 0)
    tl.store(of_x_ptr + channel, -rstd * (t_x + r_spread), mask=once)
    tl.store(of_x_ptr + channels + channel, -rstd * t_mean, mask=once)


def merge(parts: Tensor, statistics: Tensor, eps: float) -> None:
    """Write ``(3, C)``: mean, rstd, unbiased variance. ``parts``: of :func:`kernels.moments`, or none of them."""
    _, n, splits, channels = parts.shape
    config = _config(n * splits, parts)
    launch(
        _merge, ceil_div(channels, config["channels"]), parts.device, parts, statistics, n * splits,
        parts.stride(0), channels, eps, BR=config["parts"], BC=config["channels"], num_warps=config["num_warps"],
    )  # fmt: skip


def add(
    parts: Tensor,
    statistics: Tensor,
    planes: Sequence[Tensor | None],
    means: Tensor | None = None,
    gain: Tensor | None = None,
    v_gain: Tensor | None = None,
    count: int = 1,
) -> None:
    """Add the parts of :func:`kernels.sums` for planes and, weighted by gains, for channels.

    Args:
        planes: ``(N, C)`` each, contiguous: takes the sums of g, g xhat, rstd v g.
        means: ``(2, C)``, with ``v_gain`` ``(7, C)``: takes what ``_add`` says. None in evaluation.
        count: values a channel.
    """
    _, n, splits, channels = parts.shape
    config = _config(n * splits, parts)
    bs = min(power_of_two(splits), config["parts"])
    (gain, gain_image), (v_gain, v_gain_image) = rows(gain), rows(v_gain)
    launch(
        _add, ceil_div(channels, config["channels"]), parts.device,
        parts, statistics, gain, v_gain, *planes, means, n, splits, parts.stride(0), channels, float(max(count, 1)),
        gain_image, v_gain_image, BN=config["parts"] // bs, BS=bs, BC=config["channels"], num_warps=config["num_warps"],
    )  # fmt: skip


def weights(
    of_gain: Tensor, planes: Tensor, means: Tensor, statistics: Tensor, gain: Tensor, v_gain: Tensor, v_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the double backward: ``(2, N, C)``, xhat's weight and the offset in what grad gets; ``(2, C)`` in what x gets.

    Writes ``of_gain``, too.
    """
    _, n, channels = planes.shape
    of_grad, of_x = planes.new_empty(2, n, channels), planes.new_empty(2, channels)
    given = [rows(t) for t in (gain, v_gain, v_bias)]
    launch(
        _weights, ceil_div(n * channels, PLANES), planes.device,
        planes, means, statistics, *(t for t, _ in given), of_gain, of_grad, of_x, n * channels, channels,
        *(image for _, image in given), BLOCK=PLANES, num_warps=4,
    )  # fmt: skip
    return of_grad, of_x


def _config(n_parts: int, parts: Tensor) -> Config:
    return configuration("merge", parts.device, min(power_of_two(n_parts), 512))
