"""Calls of an op past torch's dispatcher, where all that it would do is to find the kernel.

To the dispatcher an op written in Python is a chain of calls from C++ into Python and back, with every argument boxed
and unboxed on the way: for the 10 arguments of ``adain`` it takes 20 us, several times as long as a small kernel. So an
eager call on plain tensors goes to the kernel directly, and its gradient is a ``torch.autograd.Function``. Whatever looks
at ops, or changes what they mean, is asked for first, and sees them through the dispatcher as ever: ``torch.compile``,
modes, transforms, subclasses of tensors, the profiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.nn import Parameter

# Each of these is asked in every call.
is_compiling = torch.compiler.is_compiling
included = torch._C._dispatch_tls_local_include_set
function_mode_is_on = torch._C._is_torch_function_mode_enabled
profiler_is_on = torch._C._autograd._profiler_enabled

#: What the dispatcher adds to the keys of a call's tensors while no mode, transform or tracer is on.
_NOTHING_ON = (DispatchKeySet(DispatchKey.BackendSelect) | DispatchKeySet(DispatchKey.ADInplaceOrView)).raw_repr()

#: Of a subclass, what an op does is the subclass's to say.
_PLAIN = frozenset({Tensor, Parameter})

_TENSORS = ("Tensor", "Optional[Tensor]")
_TENSOR_LIST = "List[Tensor]"


def direct(
    dispatched: torch._ops.OpOverload,
    implementation: Callable[..., Any],
    save: Callable[..., None] | None,
    gradient: Callable[..., Any] | None,
) -> Callable[..., Any]:
    """An op to be called with positional arguments: by its implementation where it can be, else as torch dispatches it.

    Args:
        dispatched: the registered op.
        implementation: what computes it from the same arguments.
        save, gradient: as in :func:`gdl_kernels._registration.register`.
    """
    types = [str(argument.type) for argument in dispatched._schema.arguments]
    single = [place for place, kind in enumerate(types) if kind in _TENSORS]
    lists = [place for place, kind in enumerate(types) if kind == _TENSOR_LIST]
    floats = [place for place, kind in enumerate(types) if kind == "float"]
    differentiable = _differentiable if not lists else _differentiable_with_lists
    with_gradient = None if gradient is None else differentiable(dispatched, implementation, save, gradient)

    def call(*args: Any) -> Any:
        if is_compiling() or included().raw_repr() != _NOTHING_ON or function_mode_is_on() or profiler_is_on():
            return dispatched(*args)
        wants_gradient = False
        for place in single:
            tensor = args[place]
            if tensor is None:
                continue
            if type(tensor) not in _PLAIN or tensor.is_neg() or tensor._is_zerotensor():
                return dispatched(*args)
            wants_gradient = wants_gradient or tensor.requires_grad
        for place in lists:
            for tensor in args[place]:
                if type(tensor) not in _PLAIN or tensor.is_neg() or tensor._is_zerotensor():
                    return dispatched(*args)
                wants_gradient = wants_gradient or tensor.requires_grad
        for place in floats:
            if type(args[place]) is not float:  # the dispatcher makes it one
                return dispatched(*args)
        if wants_gradient and with_gradient is not None and torch.is_grad_enabled():
            return with_gradient(*args)
        return implementation(*args)

    return call


def _differentiable(
    dispatched: torch._ops.OpOverload,
    implementation: Callable[..., Any],
    save: Callable[..., None],
    gradient: Callable[..., Any],
) -> Callable[..., Any]:
    def forward(ctx: Any, *args: Any) -> Any:
        out = implementation(*args)
        save(ctx, args, out)
        return out

    return _function(dispatched, forward, gradient).apply


def _differentiable_with_lists(
    dispatched: torch._ops.OpOverload,
    implementation: Callable[..., Any],
    save: Callable[..., None],
    gradient: Callable[..., Any],
) -> Callable[..., Any]:
    """The same of an op that takes lists of tensors, or gives them: autograd knows tensors alone."""
    schema = dispatched._schema
    takes, gives = ([str(t.type) == _TENSOR_LIST for t in side] for side in (schema.arguments, schema.returns))

    def forward(ctx: Any, lengths: _Lengths, *flat: Any) -> tuple[Any, ...]:
        args = _nested(flat, lengths.args)
        out = implementation(*args)
        save(ctx, args, out)
        flat_out, lengths.outputs = _flattened(out if len(gives) > 1 else (out,), gives)
        ctx.lengths = lengths
        return tuple(flat_out)

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        lengths, needed = ctx.lengths, ctx.needs_input_grad
        ctx.needs_input_grad = _nested(needed[1:], lengths.args)
        try:
            found = gradient(ctx, *_nested(grads, lengths.outputs))
        finally:
            ctx.needs_input_grad = needed
        return None, *_flattened(found if len(takes) > 1 else (found,), takes)[0]

    apply = _function(dispatched, forward, backward).apply

    def call(*args: Any) -> Any:
        lengths = _Lengths()
        flat, lengths.args = _flattened(args, takes)
        out = _nested(apply(lengths, *flat), lengths.outputs)
        return out if len(gives) > 1 else out[0]

    return call


def _function(
    dispatched: torch._ops.OpOverload, forward: Callable[..., Any], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    name = dispatched._schema.name.replace("::", "_")
    return type(name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})


class _Lengths:
    """How long each list of tensors of a call is, None for what is none; of the outputs once they are there."""

    args: list[int | None]
    outputs: list[int | None]


def _flattened(values: Sequence[Any], lists: Sequence[bool]) -> tuple[list[Any], list[int | None]]:
    flat: list[Any] = []
    lengths: list[int | None] = []
    for value, is_list in zip(values, lists):
        if is_list:
            flat += value
            lengths.append(len(value))
        else:
            flat.append(value)
            lengths.append(None)
    return flat, lengths


def _nested(flat: Sequence[Any], lengths: list[int | None]) -> tuple[Any, ...]:
    values: list[Any] = []
    place = 0
    for length in lengths:
        if length is None:
            values.append(flat[place])
            place += 1
        else:
            values.append(list(flat[place : place + length]))
            place += length
    return tuple(values)
