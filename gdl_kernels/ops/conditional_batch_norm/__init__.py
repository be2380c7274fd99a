"""Batch norm with a gain and a bias for each sample."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..._arguments import check_finite, check_floating, check_parameter, check_positive, to_dtype
from ..._direct import DISPATCHED, way_of
from . import cpu, op, ranks, reference


def conditional_batch_norm(
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    process_group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """Batch norm whose gain and bias each sample has of its own (SAGAN, arXiv 1805.08318; BigGAN, arXiv 1809.11096).

    ``y[n, c, p] = gain[n, c] * (x[n, c, p] - mean[c]) / sqrt(var[c] + eps) + bias[n, c]``

    In training ``mean`` and ``var`` (biased) are those of the batch, over samples and pixels, and the running
    statistics move towards them as in ``torch.nn.functional.batch_norm``: ``running_mean += momentum * (mean -
    running_mean)``, and ``running_var`` the same towards the unbiased variance. In evaluation they are the running
    statistics, constants to the gradient.

    Args:
        x: ``(N, C, *spatial)``, floating point, any strides.
        gain, bias: ``(N, C)``, in one dtype: float32, float16, bfloat16, or float64 beside float64. The gain is the
            whole factor: BigGAN's is ``1 + linear(embedding)``, and the caller adds the 1.
        running_mean, running_var: ``(C,)``, in such a dtype, float32 as a rule; updated in place in training. Both may
            be None in training, and must be given in evaluation.
        training: whether to use the statistics of the batch.
        momentum: from 0 to 1; a number, or a tensor ``()`` on the device of ``x``, which costs no wait for the GPU.
        eps: added to the variance; must be positive.
        process_group: a ``torch.distributed.ProcessGroup`` over whose ranks the statistics of the batch are taken.
            Batches may differ in size, and be empty. Each rank has to call, and to differentiate, the same number of
            times.
        backend: overrides the backend of this call.

    Returns:
        A tensor like ``x``, contiguous or, where ``x`` is, channels last. Autocast leaves its dtype alone. Accumulates
        in float32, in float64 for float64. Differentiable in ``x``, ``gain`` and ``bias``, across ranks too: twice by
        kernels, further by the reference; under ``torch.compile`` once, without a process group.

    Raises:
        ValueError: if a shape or device doesn't fit, running statistics are missing, ``momentum`` isn't from 0 to 1,
            ``eps`` isn't positive and finite, or in training a channel has a single value.
        TypeError: if an argument is of another type or dtype.
        RuntimeError: if ``backend`` was given and can't serve the call.
    """
    ranks.check(process_group)
    chosen = _serving(
        backend, x, gain, bias, running_mean, running_var, training, momentum, eps, ranks.size(process_group)
    )
    group = ranks.name(process_group) if training else ""
    given = (None, None) if training else (running_mean, running_var)
    if chosen == "reference":
        y, statistics = reference.conditional_batch_norm(x, gain, bias, *given, eps, group)
        way = DISPATCHED
    else:
        way = way_of("gdl_kernels::conditional_batch_norm", (x, gain, bias, running_mean, running_var, chosen))
        y, statistics = op.forward.by(way, (x, gain, bias, *given, eps, group, chosen))
    if training and running_mean is not None and running_var is not None and (group or x.numel()):
        if (
            way != DISPATCHED
            and chosen == "cpu"
            and not isinstance(momentum, Tensor)
            and not (running_mean.is_inference() or running_var.is_inference())  # torch knows when these may change
        ):
            cpu.move(running_mean, running_var, statistics, momentum)
        else:
            _move(running_mean, running_var, statistics, momentum)
    return y


def _move(running_mean: Tensor, running_var: Tensor, statistics: Tensor, momentum: float | Tensor) -> None:
    running = [running_mean, running_var]
    with torch.no_grad():
        mean, _, unbiased_var = statistics.unbind()
        batch = [to_dtype(to, t.dtype) for t, to in zip(running, (mean, unbiased_var))]
        if isinstance(momentum, Tensor):
            torch._foreach_lerp_(running, batch, [momentum.to(t.dtype) for t in running])
        else:
            torch._foreach_lerp_(running, batch, momentum)


@op.choices.serving
def _serving(
    backend: str | None, x: Tensor, gain: Tensor, bias: Tensor, running_mean: Tensor | None,
    running_var: Tensor | None, training: bool, momentum: float | Tensor, eps: float, group_size: int,
) -> str:  # fmt: skip
    check_floating("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must be (N, C, *spatial), got shape {tuple(x.shape)}")
    planes, per_channel = [x.shape[:2]], [x.shape[1:2]]
    check_parameter("gain", gain, planes, x)
    check_parameter("bias", bias, planes, x)
    if gain.dtype != bias.dtype:
        raise TypeError(f"gain and bias must have one dtype, got {gain.dtype} and {bias.dtype}")
    if (running_mean is None) != (running_var is None):
        missing, other = ("running_mean", "running_var")[:: 1 if running_mean is None else -1]
        raise ValueError(f"{missing} must be given where {other} is, got None")
    if running_mean is None and not training:
        raise ValueError("running_mean and running_var must be given when training is False, got None")
    for name, running in (("running_mean", running_mean), ("running_var", running_var)):
        if running is not None:
            check_parameter(name, running, per_channel, x)
            if running.requires_grad:
                raise ValueError(f"{name} must not require a gradient: it is a constant to the gradient")
            if training and running.shape[0] > 1 and running.stride(0) == 0:
                raise ValueError(f"{name} must have memory for each channel, to be updated in place, got strides (0,)")
    if isinstance(momentum, Tensor):
        if momentum.dim() or not momentum.is_floating_point():
            got = f"{momentum.dtype} {tuple(momentum.shape)}"
            raise ValueError(f"momentum must be a number or a floating-point tensor of shape (), got {got}")
    else:
        check_finite("momentum", momentum, "from 0 to 1")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be from 0 to 1, got {momentum}")
    check_positive("eps", eps)
    if training and x.shape[0] * math.prod(x.shape[2:]) == 1 and group_size == 1:
        raise ValueError(f"x must have more than one value per channel in training, got shape {tuple(x.shape)}")
    return op.choices.pick(x.device, backend, x, gain, bias, running_mean, running_var, training=training)
