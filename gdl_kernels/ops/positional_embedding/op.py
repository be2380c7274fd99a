"""Token embeddings with sinusoidal positions as torch knows them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _backends, _native
from ..._registration import launchers, register


def _cpu_reasons(tokens: Tensor, weight: Tensor, **_: Any) -> list[str]:
    return _native.missing("cpu") + ([] if weight.is_cpu else [f"weight is on {weight.device}"])


def _triton_reasons(tokens: Tensor, weight: Tensor, **_: Any) -> list[str]:
    reasons = _native.missing("triton")
    if weight.device.type != "cuda" and not (_native.interpreting() and weight.device.type == "cpu"):
        reasons.append(f"weight is on {weight.device}")
    if weight.dtype == torch.float64:
        reasons.append("weight is float64")
    return reasons


def _examples() -> Iterator[_backends.Example]:
    """A model's width, far along in a long piece; and sizes that fill no vector, tokens that come often and never."""
    for name, shape, rows, width, call in (
        ("512 columns, from position 10,000", (2, 40), 300, 512, {"start": 10_000}),
        ("odd sizes", (3, 5, 7), 11, 37, {"scale": 0.7}),
        ("few tokens, often", (2, 300), 5, 24, {"start": 3}),
    ):
        tokens = torch.randint(rows, shape)
        yield _backends.Example(name, (tokens, torch.randn(rows, width, requires_grad=True)), call)


choices = _backends.add_op("positional_embedding", {"cpu": _cpu_reasons, "triton": _triton_reasons}, _examples)


def _output(tokens: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return weight.new_empty(*tokens.shape, weight.shape[1])


def _grad_weight(grad: Tensor, tokens: Tensor, num_embeddings: int, *_: Any) -> Tensor:
    return grad.new_empty(num_embeddings, grad.shape[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, weight, ctx.scale, _start, ctx.backend = inputs
    ctx.num_embeddings = weight.shape[0]
    ctx.save_for_backward(tokens)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (tokens,) = ctx.saved_tensors
    return None, backward(grad, tokens, ctx.num_embeddings, ctx.scale, ctx.backend), None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _grad, tokens, _num_embeddings, ctx.scale, _backend = inputs
    ctx.save_for_backward(tokens)


def _gradient_of_backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
    """Each position's gradient is that of its token's row, scaled."""
    (tokens,) = ctx.saved_tensors
    wide = torch.promote_types(v.dtype, torch.float32)
    return (ctx.scale * F.embedding(tokens, v).to(wide)).to(v.dtype), None, None, None, None


_KERNELS = ("cpu", "triton")

backward = register(
    "positional_embedding_backward",
    "(Tensor grad, Tensor tokens, SymInt num_embeddings, float scale, str backend) -> Tensor",
    outputs=_grad_weight,
    kernels=launchers(__package__, "backward", _KERNELS),
    save=_save_backward,
    gradient=_gradient_of_backward,
)

forward = register(
    "positional_embedding",
    "(Tensor tokens, Tensor weight, float scale, SymInt start, str backend) -> Tensor",
    outputs=_output,
    kernels=launchers(__package__, "forward", _KERNELS),
    save=_save,
    gradient=_gradient,
)
