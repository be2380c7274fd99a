"""Calls of an op past torch's dispatcher, where all that it would do is to find the kernel.

To the dispatcher an op written in Python is a chain of calls from C++ into Python and back, with every argument boxed
and unboxed on the way: for the 10 arguments of ``adain`` it takes 20 us, many times as long as a small kernel. So an
eager call on plain tensors goes to the kernel directly, and its gradient is a ``torch.autograd.Function``. Whatever
looks at ops, or changes what they mean, is asked for first, and sees them through the dispatcher as ever:
``torch.compile``, modes, transforms, subclasses of tensors, the profiler. A call's arguments are looked at in C++, with
which the CPU's kernels come: without them every call is the dispatcher's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from . import _native

# Each of these is asked in every call.
_is_compiling = torch.compiler.is_compiling
_included = torch._C._dispatch_tls_local_include_set
_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_function_mode_is_on = torch._C._is_torch_function_mode_enabled
_profiler_is_on = torch._C._autograd._profiler_enabled
_gradients_are_on = torch.is_grad_enabled

#: What the dispatcher adds to the keys of a call's tensors while no mode, transform or tracer is on.
_NOT_IN_INFERENCE = DispatchKeySet(DispatchKey.ADInplaceOrView).raw_repr()
_NOTHING_ON = DispatchKeySet(DispatchKey.BackendSelect).raw_repr() | _NOT_IN_INFERENCE

#: What the dispatcher leaves out of them in inference mode, and inside the kernel of an op, which gradients are above.
_AUTOGRAD = DispatchKey.AutogradFunctionality

_TENSOR_LIST = "List[Tensor]"

#: Verdicts of ``look``, in csrc/bindings_cpu_calls.cpp, on a call's arguments.
_DISPATCH, _DIRECT, _WITH_GRADIENT = 0, 1, 2


def direct(
    dispatched: torch._ops.OpOverload,
    implementation: Callable[..., Any],
    save: Callable[..., Any] | None,
    gradient: Callable[..., Any] | None,
) -> Callable[..., Any]:
    """An op to be called with positional arguments: by its implementation where it can be, else as torch dispatches it.

    Args:
        dispatched: the registered op.
        implementation: what computes it from the same arguments.
        save, gradient: as in :func:`gdl_kernels._registration.register`.

    Returns:
        The op; its attribute ``dispatched`` is the registered one.
    """
    schema = dispatched._schema
    types, outputs = ([str(t.type) for t in side] for side in (schema.arguments, schema.returns))
    floats = [place for place, kind in enumerate(types) if kind == "float"]
    with_gradient: Callable[..., Any] = dispatched
    with_gradient_in_lists: Callable[..., Any] = dispatched
    if save is not None and gradient is not None:
        given = dispatched, implementation, save, gradient
        with_gradient_in_lists = _differentiable_with_lists(*given)
        with_gradient = with_gradient_in_lists if _TENSOR_LIST in outputs else _differentiable(*given)
    native, _ = _native.cpu()
    look = native.look if native is not None else None

    def call(*args: Any) -> Any:
        if _is_compiling():
            return dispatched(*args)
        if forward_ad._current_level >= 0:
            _refuse_tangents(schema.name, args)
        if (
            look is None
            or _included().raw_repr() | _NOT_IN_INFERENCE != _NOTHING_ON
            or _function_mode_is_on()
            or _profiler_is_on()
        ):
            return dispatched(*args)
        verdict = look(args, _gradients_are_on())
        if verdict == _DISPATCH:
            return dispatched(*args)
        for place in floats:
            if type(args[place]) is not float:  # the dispatcher too makes it one
                args = (*args[:place], float(args[place]), *args[place + 1 :])
        if verdict == _DIRECT or _excluded(_AUTOGRAD):
            return implementation(*args)
        return with_gradient(*args) if verdict == _WITH_GRADIENT else with_gradient_in_lists(*args)

    call.dispatched = dispatched  # type: ignore[attr-defined]
    return call


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    """In forward mode an op without a formula would be taken for a constant."""
    for tensor in tree_leaves(args):
        if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{name} has no forward-mode derivative on the backend {args[-1]!r}: use backend='reference' there, "
                "or differentiate backwards"
            )


def _differentiable(
    dispatched: torch._ops.OpOverload,
    implementation: Callable[..., Any],
    save: Callable[..., None],
    gradient: Callable[..., Any],
) -> Callable[..., Any]:
    """An op to autograd. Lists it takes for constants, which ``ctx.needs_input_grad`` has one False for each."""
    lists = [place for place, argument in enumerate(dispatched._schema.arguments) if str(argument.type) == _TENSOR_LIST]

    def forward(ctx: Any, *args: Any) -> Any:
        out = implementation(*args)
        save(ctx, args, out)
        return out

    def backward(ctx: Any, *grads: Any) -> Any:
        found = list(gradient(ctx, *grads))
        for place in lists:
            found[place] = None  # and not one for each of its tensors
        return tuple(found)

    return _apply(dispatched, forward, backward if lists else gradient)


def _differentiable_with_lists(
    dispatched: torch._ops.OpOverload,
    implementation: Callable[..., Any],
    save: Callable[..., None],
    gradient: Callable[..., Any],
) -> Callable[..., Any]:
    """The same of an op that takes lists of tensors, or gives them: autograd knows tensors alone.

    So lists are laid out flat, but for those of which nothing requires a gradient: autograd does not look into them.
    """
    schema = dispatched._schema
    takes, gives = ([str(t.type) == _TENSOR_LIST for t in side] for side in (schema.arguments, schema.returns))

    def forward(ctx: Any, lists: _Lists, *flat: Any) -> tuple[Any, ...]:
        args = _nested(flat, lists.args)
        out = implementation(*args)
        save(ctx, args, out)
        flat_out, lists.outputs = _flattened(out if len(gives) > 1 else (out,), gives)
        ctx.lists = lists
        needed = zip(_nested(ctx.needs_input_grad[1:], lists.args), lists.unseen)
        ctx.needs_input_grad = tuple([needs if count is None else [False] * count for needs, count in needed])
        return tuple(flat_out)

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        lists = ctx.lists
        found = gradient(ctx, *_nested(grads, lists.outputs))
        found = found if len(takes) > 1 else (found,)
        found = [grad if count is None else None for grad, count in zip(found, lists.unseen)]
        return None, *_flattened(found, [length is not None for length in lists.args])[0]

    apply = _apply(dispatched, forward, backward)

    def call(*args: Any) -> Any:
        lists = _Lists()
        seen = [is_list and any(t.requires_grad for t in arg) for arg, is_list in zip(args, takes)]
        lists.unseen = [len(arg) if is_list and not flat else None for arg, is_list, flat in zip(args, takes, seen)]
        flat_args, lists.args = _flattened(args, seen)
        out = _nested(apply(lists, *flat_args), lists.outputs)
        return out if len(gives) > 1 else out[0]

    return call


def _apply(
    dispatched: torch._ops.OpOverload, forward: Callable[..., Any], backward: Callable[..., Any]
) -> Callable[..., Any]:
    name = dispatched._schema.name.replace("::", "_")
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(name, (torch.autograd.Function,), methods)
    # Function.apply itself first looks for transforms of torch.func, which are not on here: that takes as long again.
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


class _Lists:
    """The lists of tensors in a call.

    Attributes:
        args: of each argument how many tensors it is laid out as, None for one that is passed as it is.
        unseen: of each list that autograd does not look into how many tensors it has, else None.
        outputs: as ``args``, once the outputs are there.
    """

    args: list[int | None]
    unseen: list[int | None]
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
