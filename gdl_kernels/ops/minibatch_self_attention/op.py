"""Self-attention of a minibatch as torch knows it.

Beside its output the op gives ``lse``, the logarithm of each query's softmax denominator, ``(B, H, W)`` in the dtype of
the sums. For ``score="l2"`` the scores in it lack ``-scale |query|^2``, which the softmax doesn't see.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import _backends, _images, _native
from ..._arguments import sum_dtype
from ..._registration import launchers, register
from . import reference

#: The most channels that the Triton kernels tile; the C++ kernels take any.
MAX_CHANNELS = 256


def _cpu_reasons(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> list[str]:
    reasons = _native.missing("cpu")
    if not query.is_cpu:
        reasons.append(f"query is on {query.device}")
    return reasons


def _triton_reasons(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> list[str]:
    reasons = _native.missing("triton")
    if query.device.type != "cuda" and not (_native.interpreting() and query.device.type == "cpu"):
        reasons.append(f"query is on {query.device}")
    if query.dtype == torch.float64:
        reasons.append("query is float64")
    if max(query.shape[1], value.shape[1]) > MAX_CHANNELS:
        reasons.append(f"a map has more than {MAX_CHANNELS} channels")
    return reasons


def _examples() -> Iterator[_backends.Example]:
    """Channels of SAGAN and BigGAN, maps that no tile divides, pooled and not, both scores, channels last."""
    for name, batch, channels, value_channels, size, call in (
        ("SAGAN G", 2, 32, 128, (16, 16), {"pool": 2}),
        ("BigGAN D", 2, 12, 48, (18, 14), {"pool": 2, "scale": 0.3}),
        ("not pooled", 2, 4, 17, (9, 13), {}),
        ("l2", 2, 24, 96, (12, 10), {"pool": 2, "score": "l2", "scale": 0.2}),
    ):
        maps = [torch.randn(batch, c, *size) for c in (channels, channels, value_channels)]
        # Gradients of scores are differences from an output that is kept rounded.
        yield _backends.Example(name, tuple(t.clone().requires_grad_() for t in maps), call, lifted=2)
        last = [t.clone(memory_format=torch.channels_last).requires_grad_() for t in maps]
        yield _backends.Example(f"{name}, channels last", tuple(last), call, lifted=2)


choices = _backends.add_op("minibatch_self_attention", {"cpu": _cpu_reasons, "triton": _triton_reasons}, _examples)


def _outputs(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, _channels, height, width = query.shape
    strides = height * width, width, 1  # with them it takes three quarters of the time to ask for
    return _images.empty_like(value), query.new_empty_strided((batch, height, width), strides, dtype=sum_dtype(query))


def _gradients(_grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(_images.empty_like(t) for t in (query, key, value))


def _second_gradients(*args: Any) -> tuple[Tensor, ...]:
    query, key, value = args[4:7]
    return tuple(_images.empty_like(t) for t in (value, query, key, value))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *ctx.call = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(query, key, value, out, lse)


def _gradient(ctx: Any, grad_out: Tensor, _grad_lse: Tensor | None) -> tuple[Any, ...]:
    return *backward(grad_out, *ctx.saved_tensors, *ctx.call), *[None] * 4


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, scale, pool, score, backend = inputs
    ctx.call = scale, pool, score, backend
    ctx.save_for_backward(*tensors)


def _gradient_of_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """``out`` and ``lse`` are functions of the other inputs: what they would pass on is in the gradients of those."""
    return *double_backward(*grads, *ctx.saved_tensors, *ctx.call), *[None] * 6


def _save_double_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.call = inputs[9:12]
    ctx.save_for_backward(*inputs[:7])  # not out and lse, which the reference computes anew


def _gradient_of_double_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """Differentiate the reference three times. Where a graph is asked for, its own goes on, to any order."""
    _backends.warn_once("minibatch_self_attention", "takes third derivatives from the reference, in O(N^2) memory")
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        # Each an object of its own, with a partial derivative of its own, still in the caller's graph.
        own = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in ctx.saved_tensors]
        *cotangents, grad_out, query, key, value = own
        out = reference.minibatch_self_attention(query, key, value, *ctx.call)
        first = torch.autograd.grad(out, [query, key, value], grad_out, create_graph=True)
        second = torch.autograd.grad(first, own[3:], cotangents, create_graph=True)
        third = torch.autograd.grad(second, own, grads, allow_unused=True, create_graph=higher)
    return *third, *[None] * 6


_CALL = "float scale, int pool, str score, str backend"
_KERNELS = ("cpu", "triton")

double_backward = register(
    "minibatch_self_attention_double_backward",
    "(Tensor grad_grad_query, Tensor grad_grad_key, Tensor grad_grad_value, Tensor grad_out, Tensor query, Tensor key, "
    f"Tensor value, Tensor out, Tensor lse, {_CALL}) -> (Tensor, Tensor, Tensor, Tensor)",
    outputs=_second_gradients,
    kernels=launchers(__package__, "double_backward", _KERNELS),
    save=_save_double_backward,
    gradient=_gradient_of_double_backward,
)

backward = register(
    "minibatch_self_attention_backward",
    f"(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, {_CALL}) "
    "-> (Tensor, Tensor, Tensor)",
    outputs=_gradients,
    kernels=launchers(__package__, "backward", _KERNELS),
    save=_save_backward,
    gradient=_gradient_of_backward,
)

forward = register(
    "minibatch_self_attention",
    f"(Tensor query, Tensor key, Tensor value, {_CALL}) -> (Tensor, Tensor)",
    outputs=_outputs,
    kernels=launchers(__package__, "forward", _KERNELS),
    save=_save,
    gradient=_gradient,
)
