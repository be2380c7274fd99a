"""The passes over memory that each op makes, and the small sums between them.

A pass is one of the three kernels. Between them there are numbers for each plane ``(N, C)`` and for each channel
``(C,)``, in plain PyTorch, and with a process group one collective. ``xhat = (x - mean) * rstd``; ``m(t)`` is a
channel's mean, over all ranks. On the CPU csrc/cpu/conditional_batch_norm.cpp does the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .... import _images
from ...._arguments import to_dtype
from .. import ranks
from . import kernels


def forward(
    out: tuple[Tensor, Tensor], x: Tensor, gain: Tensor, bias: Tensor, mean: Tensor | None,
    var: Tensor | None, eps: float, group: str, backend: str,
) -> None:  # fmt: skip
    y, statistics = out
    wide, last = statistics.dtype, _images.channels_last(y)
    x = _images.lines(x, last).tensor
    if mean is None or var is None:
        moments = kernels.moments(x, last) if x.numel() else statistics.new_zeros(2, x.shape[1])
        count, (mean, squares) = ranks.merge_moments(values_per_channel(x), moments, group)
        if isinstance(count, Tensor):
            var, unbiased_var = squares / count.clamp(min=1), squares / (count - 1).clamp(min=1)
        else:
            var, unbiased_var = squares / max(count, 1), squares / max(count - 1, 1)
    else:
        mean, var = to_dtype(mean, wide), to_dtype(var, wide)
        unbiased_var = var
    mean_out, rstd, unbiased_var_out = statistics.unbind()
    mean_out.copy_(mean)
    rstd.copy_((var + eps).rsqrt_())
    unbiased_var_out.copy_(unbiased_var)
    if x.numel():
        kernels.combine(y, [], (x, gain * rstd), mean_out, to_dtype(bias, wide), last)


def backward(
    out: tuple[Tensor, Tensor, Tensor], grad: Tensor, x: Tensor, gain: Tensor, statistics: Tensor,
    training: bool, eps: float, group: str, backend: str,
) -> None:  # fmt: skip
    """``grad_x = rstd (gain g - m(gain g) - xhat m(gain g xhat))``; in evaluation both means are 0."""
    grad_x, grad_gain, grad_bias = out
    last = _images.channels_last(grad_x)
    grad, x = (_images.lines(t, last).tensor for t in (grad, x))
    mean, rstd, _ = statistics
    sums = kernels.sums(None, grad, x, mean, last) if x.numel() else statistics.new_zeros(2, *x.shape[:2])
    sums[1] *= rstd
    grad_bias.copy_(sums[0])
    grad_gain.copy_(sums[1])
    scale = gain * rstd
    if not training:
        if x.numel():
            kernels.combine(grad_x, [(grad, scale)], None, mean, torch.zeros_like(mean), last)
        return
    m_g, m_gx = ranks.mean((sums * gain).sum(1), values_per_channel(x), group)
    if x.numel():
        kernels.combine(grad_x, [(grad, scale)], (x, -m_gx * rstd * rstd), mean, -m_g * rstd, last)


def double_backward(
    out: tuple[Tensor, Tensor, Tensor], v: Tensor, v_gain: Tensor, v_bias: Tensor, grad: Tensor,
    x: Tensor, gain: Tensor, statistics: Tensor, training: bool, eps: float, group: str, backend: str,
) -> None:  # fmt: skip
    """The gradient of ``<v, grad_x> + <v_gain, grad_gain> + <v_bias, grad_bias>``; docs/conditional_batch_norm.md."""
    of_grad, of_x, of_gain = out
    last = _images.channels_last(of_x)
    v, grad, x = (_images.lines(t, last).tensor for t in (v, grad, x))
    mean, rstd, _ = statistics
    wide = statistics.dtype
    gain, v_gain, v_bias = (t.to(wide) for t in (gain, v_gain, v_bias))
    sums = kernels.sums(v, grad, x, mean, last) if x.numel() else statistics.new_zeros(5, *x.shape[:2])
    g, gx, s_v, s_vx, vg = sums.unbind()
    gx *= rstd
    s_vx *= rstd
    scale = gain * rstd
    if not training:
        of_gain.copy_(rstd * vg)
        if x.numel():
            kernels.combine(of_grad, [(v, scale)], (x, v_gain * rstd), mean, v_bias, last)
            kernels.combine(of_x, [(grad, v_gain * rstd)], None, mean, torch.zeros_like(mean), last)
        return
    channel = torch.stack([s_v, s_vx, gain * g, gain * gx, gain * vg, v_gain * g, v_gain * gx]).sum(1)
    m_v, m_vx, m_g, m_gx, m_vg, m_t, m_tx = ranks.mean(channel, values_per_channel(x), group)
    of_gain.copy_(rstd * (vg - m_v * g - m_vx * gx))
    if x.numel():
        # t = (v_gain - gain rstd m(v xhat)) g - rstd m(gain g xhat) v is what xhat gets, rstd gets the spread.
        along = v_gain - scale * m_vx
        t_mean = m_t - rstd * (m_gx * m_v + m_vx * m_g)
        t_x = m_tx - 2 * rstd * m_gx * m_vx
        spread = m_vg - m_v * m_g - m_vx * m_gx
        kernels.combine(of_grad, [(v, scale)], (x, along * rstd), mean, v_bias - scale * m_v, last)
        kernels.combine(
            of_x,
            [(v, -m_gx * rstd * rstd), (grad, along * rstd)],
            (x, -(t_x + rstd * spread) * rstd * rstd),
            mean,
            -t_mean * rstd,
            last,
        )


def values_per_channel(x: Tensor) -> int:
    return x.shape[0] * math.prod(x.shape[2:])
