"""Block-sparse attention as torch knows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _backends, _native
from ..._arguments import sum_dtype
from ..._registration import launchers, register
from ...layouts import BlockLists, Layout, causal, from_mask, strided
from . import reference


def check_start(start: int, n_q: int, n_k: int, sizes: Sequence[int]) -> None:
    """Refuse queries that a layout doesn't have, or that look at keys which are not there yet."""
    layout_n_q, layout_n_k, _, causal = sizes
    end = start + n_q
    if start < 0 or end > layout_n_q:
        raise ValueError(
            f"layout has queries 0 to {layout_n_q - 1}, but query_start={start} with {n_q} queries asks for "
            f"{start} to {end - 1}"
        )
    if causal and n_k < end and n_k < layout_n_k:
        raise ValueError(
            f"a causal layout of {layout_n_k} keys, asked for queries up to {end - 1}, needs between {end} and "
            f"{layout_n_k} keys, got {n_k}"
        )


#: The largest head that the Triton kernels tile; the C++ kernels take any.
MAX_HEAD_DIM = 256


def _cpu_reasons(query: Tensor, *_: Any, **__: Any) -> list[str]:
    reasons = _native.missing("cpu")
    if not query.is_cpu:
        reasons.append(f"query is on {query.device}")
    return reasons


def _triton_reasons(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> list[str]:
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
    # Heads of the sizes that models have; then a few queries, which the kernels treat apart.
    yield _backends.Example(
        "causal, 64 features, dropout",
        (heads(4, 300, 64), heads(2, 300, 64), heads(2, 300, 64), causal(300, block_size=128)),
        {"dropout_p": 0.2},
    )
    yield _backends.Example(
        "decode one token, strided",
        (heads(6, 1, 64), heads(2, 250, 64), heads(2, 250, 64), strided(300, 7, block_size=32)),
        {"query_start": 249},
    )


choices = _backends.add_op("sparse_attention", {"cpu": _cpu_reasons, "triton": _triton_reasons}, _examples)


def _outputs(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, n_q, _head_dim = query.shape
    width = value.shape[3]
    # (B, H, N, D) in memory as (B, N, H, D): the output projection that follows then needs no copy. No view, which
    # autograd would not let anybody change in place.
    strides = n_q * heads * width, width, heads * width, 1
    out = query.new_empty_strided((batch, heads, n_q, width), strides)
    # With strides, and without a dtype that it has anyway, it takes half the time to ask for.
    lse, dtype = ((batch, heads, n_q), (heads * n_q, n_q, 1)), sum_dtype(query)
    return out, query.new_empty_strided(*lse) if dtype is query.dtype else query.new_empty_strided(*lse, dtype=dtype)


def _gradients(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _second_gradients(
    _query: Tensor, _key: Tensor, _value: Tensor, grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor,
    value: Tensor, out: Tensor, lse: Tensor, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of ``grad_out``, ``grad_lse``, ``query``, ``key`` and ``value``."""
    grad_grad_lse = torch.empty_like(lse, memory_format=torch.contiguous_format)  # as the kernels keep lse
    return torch.empty_like(out), grad_grad_lse, *_gradients(grad_out, grad_lse, query, key, value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, *call = inputs
    _keep(ctx, (query, key, value, *output), call)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    (query, key, value, out, lse), call = _kept(ctx, 5)
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    return *backward(grad_out, grad_lse, query, key, value, out, lse, *call), *_no_gradients(call)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _keep(ctx, inputs[:7], inputs[7:])


def _gradient_of_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """``out`` and ``lse`` are functions of the other inputs: what they would pass on is in the gradients of those."""
    (grad_out, grad_lse, *rest), call = _kept(ctx, 7)
    grad_grad_out, grad_grad_lse, *second = double_backward(*grads, grad_out, grad_lse, *rest, *call)
    return grad_grad_out, None if grad_lse is None else grad_grad_lse, *second, None, None, *_no_gradients(call)


def _save_double_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _keep(ctx, inputs[:8], inputs[10:])  # not out and lse, which the reference computes anew


def _gradient_of_double_backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    """Differentiate the reference three times. Where a graph is asked for, its own goes on, to any order."""
    _backends.warn_once("sparse_attention", "takes third derivatives from the reference, in O(Nq * Nk) memory")
    tensors, call = _kept(ctx, 8)
    padding, layout, sizes, scale, query_start, start_tensor, dropout_p, seed, _backend = call
    higher = torch.is_grad_enabled()
    with torch.enable_grad():
        # Each an object of its own, with a partial derivative of its own, still in the caller's graph.
        own: list[Any] = [
            t if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in tensors
        ]
        *cotangents, grad_out, grad_lse, query, key, value = own
        inputs = [query, key, value]
        out, lse = by_reference(
            query, key, value, padding, layout_of(layout, sizes), scale, query_start, start_tensor, dropout_p, seed,
            grad_lse is not None,
        )  # fmt: skip
        outputs: list[Any] = [out] if grad_lse is None else [out, lse]
        given = [grad_out] if grad_lse is None else [grad_out, grad_lse]
        first = torch.autograd.grad(outputs, inputs, given, create_graph=True)
        second = torch.autograd.grad(first, [*given, *inputs], cotangents, create_graph=True)
        if grad_lse is None:
            grads = (grads[0], *grads[2:])
        wanted = [t for t in own if t is not None]
        third = iter(torch.autograd.grad(second, wanted, grads, allow_unused=True, create_graph=higher))
    return *(None if t is None else next(third) for t in own), None, None, *_no_gradients(call)


def _keep(ctx: Any, tensors: Sequence[Tensor | None], call: Sequence[Any]) -> None:
    padding, layout, sizes, scale, query_start, start_tensor, dropout_p, seed, backend = call
    ctx.save_for_backward(*tensors, padding, start_tensor, seed)
    ctx.call = layout, sizes, scale, query_start, dropout_p, backend  # a layout's tensors never change


def _kept(ctx: Any, count: int) -> tuple[list[Tensor], list[Any]]:
    """The tensors of a call, and what an op takes after them."""
    saved = ctx.saved_tensors  # once: torch.utils.checkpoint gives them no second time
    tensors, (padding, start_tensor, seed) = saved[:count], saved[count:]
    layout, sizes, scale, query_start, dropout_p, backend = ctx.call
    return list(tensors), [padding, layout, sizes, scale, query_start, start_tensor, dropout_p, seed, backend]


def _no_gradients(call: Sequence[Any]) -> list[Any]:
    return [None, [None] * len(call[1]), *[None] * (len(call) - 2)]


def by_reference(
    query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, layout: Layout, scale: float,
    query_start: int, start_tensor: Tensor | None, dropout_p: float, seed: Tensor | None, return_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """What an op is given, computed by the reference."""
    batch, heads, n_q, _ = query.shape
    n_k = key.shape[2]
    mask, dropout = layout.dense_mask()[:, :, :n_k], None
    if start_tensor is None:
        mask = mask[:, query_start : query_start + n_q]
    if start_tensor is not None or seed is not None:
        positions = torch.arange(n_q, device=query.device) + query_start
        if start_tensor is not None:
            positions = positions + start_tensor
            mask = mask[:, positions]
        if seed is not None:
            dropout = reference.dropout_multiplier(seed, dropout_p, batch, heads, positions, n_k)
    return reference.sparse_attention(query, key, value, mask, scale, key_padding_mask, dropout, return_lse)


def layout_of(tensors: Sequence[Tensor], sizes: Sequence[int]) -> Layout:
    """The layout whose tensors and sizes an op was given."""
    n_q, n_k, block_size, causal = sizes
    rows, columns, (table, order, _places) = BlockLists(*tensors[:5]), BlockLists(*tensors[5:10]), tensors[10:]
    return Layout(n_q, n_k, block_size, rows.splits.shape[0], bool(causal), rows, columns, table, order)


# layout: Layout.tensors(). sizes: Layout.sizes(). The first query is at query_start, plus start_tensor where that is
# given, an integer () on the device. seed is given, int64 () on the device, where dropout_p is not 0.
_CALL = (
    "Tensor? key_padding_mask, Tensor[] layout, SymInt[] sizes, float scale, SymInt query_start, Tensor? start_tensor, "
    "float dropout_p, Tensor? seed, str backend"
)
_KERNELS = ("cpu", "triton")

double_backward = register(
    "sparse_attention_double_backward",
    "(Tensor grad_grad_query, Tensor grad_grad_key, Tensor grad_grad_value, Tensor grad_out, Tensor? grad_lse, "
    f"Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, {_CALL}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    outputs=_second_gradients,
    kernels=launchers(__package__, "double_backward", _KERNELS),
    save=_save_double_backward,
    gradient=_gradient_of_double_backward,
)

backward = register(
    "sparse_attention_backward",
    "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    f"{_CALL}) -> (Tensor, Tensor, Tensor)",
    outputs=_gradients,
    kernels=launchers(__package__, "backward", _KERNELS),
    save=_save_backward,
    gradient=_gradient_of_backward,
)

forward = register(
    "sparse_attention",
    f"(Tensor query, Tensor key, Tensor value, {_CALL}) -> (Tensor, Tensor)",
    outputs=_outputs,
    kernels=launchers(__package__, "forward", _KERNELS),
    save=_save,
    gradient=_gradient,
)
