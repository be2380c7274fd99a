"""Block-sparse attention as torch knows it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import _backends, _native
from ..._registration import register
from ...layouts import BlockLists, Layout, from_mask
from . import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

#: The largest head that the Triton kernels tile; the C++ kernels take any.
MAX_HEAD_DIM = 256


def _cpu_reasons(query: Tensor, key: Tensor, value: Tensor, layout: Layout, **_: Any) -> list[str]:
    reasons = _native.missing("cpu")
    if query.device.type != "cpu":
        reasons.append(f"query is on {query.device}")
    return reasons


def _triton_reasons(query: Tensor, key: Tensor, value: Tensor, layout: Layout, **_: Any) -> list[str]:
    reasons = _native.missing("triton")
    if query.device.type != "cuda" and not (_native.interpreting() and query.device.type == "cpu"):
        reasons.append(f"query is on {query.device}")
    if query.dtype == torch.float64:
        reasons.append("query is float64")
    if max(query.shape[-1], value.shape[-1]) > MAX_HEAD_DIM:
        reasons.append(f"a head has more than {MAX_HEAD_DIM} features")
    return reasons


def _examples() -> Iterator[_backends.Example]:
    """Full, partial and empty blocks, lengths that no block divides, shared keys, and a row that keeps nothing."""

    def heads(count: int, positions: int, features: int) -> Tensor:
        return torch.randn(2, count, positions, features, requires_grad=True)

    near = torch.ones(200, 200).tril().triu(-90).bool()
    yield _backends.Example(
        "local, 4 heads on 2", (heads(4, 200, 64), heads(2, 200, 64), heads(2, 200, 64), from_mask(near))
    )
    scattered = torch.rand(2, 5, 9).gt(0.5).repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :150, :270]
    scattered &= torch.rand(2, 150, 270).gt(0.2)
    scattered[:, 7] = False
    padding = torch.rand(2, 270).gt(0.9)
    yield _backends.Example(
        "scattered, padding, lse",
        (heads(2, 100, 40), heads(2, 270, 40), heads(2, 270, 24), from_mask(scattered, block_size=32)),
        {"key_padding_mask": padding, "return_lse": True, "query_start": 3, "scale": 0.3},
    )


choices = _backends.add_op("sparse_attention", {"cpu": _cpu_reasons, "triton": _triton_reasons}, _examples)


def _outputs(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, n_q, _head_dim = query.shape
    # (B, H, N, D) in memory as (B, N, H, D): the output projection that follows then needs no copy.
    out = query.new_empty(batch, n_q, heads, value.shape[-1]).transpose(1, 2)
    return out, query.new_empty(batch, heads, n_q, dtype=torch.promote_types(query.dtype, torch.float32))


def _gradients(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _launcher(backend: str, name: str) -> Any:
    """Calls ``<backend>.<name>`` beside this file, which is imported at the first call."""

    def launch(*args: Any) -> None:
        getattr(importlib.import_module(f".{backend}", __package__), name)(*args)

    return launch


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, key_padding_mask, layout, *rest = inputs
    ctx.save_for_backward(query, key, value, *output, key_padding_mask, *layout)
    ctx.rest = rest
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    query, key, value, out, lse, key_padding_mask, *layout = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = backward(grad_out, grad_lse, query, key, value, out, lse, key_padding_mask, layout, *ctx.rest)
    return *grads, None, [None] * len(layout), None, None, None, None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad_out, grad_lse, query, key, value, _out, _lse, key_padding_mask, layout, sizes, scale, query_start, _ = inputs
    ctx.save_for_backward(grad_out, grad_lse, query, key, value, key_padding_mask, *layout)
    ctx.rest = sizes, scale, query_start


def _gradient_of_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """Differentiate the reference twice. It recomputes ``out`` and ``lse``, so they get no gradient of their own.

    Where a graph is asked for, the reference's own graph goes on, to any order.
    """
    _backends.warn_once("sparse_attention", "takes second derivatives from the reference, in O(Nq * Nk) memory")
    grad_out, grad_lse, query, key, value, key_padding_mask, *tensors = ctx.saved_tensors
    sizes, scale, query_start = ctx.rest
    mask = layout_of(tensors, sizes).dense_mask()[:, query_start : query_start + query.shape[2], : key.shape[2]]
    higher = torch.is_grad_enabled()

    def own(tensor: Tensor) -> Tensor:
        """The tensor as an object of its own, with a partial derivative of its own, still in the caller's graph."""
        return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()

    with torch.enable_grad():
        q, k, v = inputs = [own(t) for t in (query, key, value)]
        out, lse = reference.sparse_attention(q, k, v, mask, scale, key_padding_mask, grad_lse is not None)
        outputs, cotangents = [out], [own(grad_out)]
        if lse is not None and grad_lse is not None:
            outputs.append(lse)
            cotangents.append(own(grad_lse))
        first = torch.autograd.grad(outputs, inputs, cotangents, create_graph=True)
        wanted = [*cotangents, *inputs]
        partials = torch.autograd.grad(first, wanted, grads, allow_unused=True, create_graph=higher)
        second: list[Tensor | None] = list(partials)
    if grad_lse is None:
        second.insert(1, None)
    return *second, None, None, None, [None] * len(tensors), None, None, None, None


def layout_of(tensors: list[Tensor], sizes: list[int]) -> Layout:
    """The layout whose tensors and ``[n_q, n_k, block_size]`` an op was given."""
    n_q, n_k, block_size = sizes
    rows, columns = BlockLists(*tensors[:4]), BlockLists(*tensors[4:8])
    return Layout(n_q, n_k, block_size, rows.splits.shape[0], False, rows, columns, *tensors[8:])


_CALL = "Tensor? key_padding_mask, Tensor[] layout, int[] sizes, float scale, int query_start, str backend"

backward = register(
    "sparse_attention_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    f"{_CALL}) -> (Tensor, Tensor, Tensor)",
    outputs=_gradients,
    kernels={name: _launcher(name, "backward") for name in ("cpu", "triton")},
    save=_save_backward,
    gradient=_gradient_of_backward,
)

forward = register(
    "sparse_attention",
    f"(Tensor query, Tensor key, Tensor value, {_CALL}) -> (Tensor, Tensor)",
    outputs=_outputs,
    kernels={name: _launcher(name, "forward") for name in ("cpu", "triton")},
    save=_save,
    gradient=_gradient,
)
