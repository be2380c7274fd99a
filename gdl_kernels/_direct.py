"""Calls of an op past torch's dispatcher, where all that it would do is to find the kernel.

To the dispatcher an op written in Python is a chain of calls from C++ into Python and back, with every argument boxed
and unboxed on the way: of ``adain`` it takes 6 us, with a gradient 34, many times as long as a small kernel. So an
eager call on plain tensors goes to the kernel directly, and its gradient is a ``torch.autograd.Function``. Whatever
looks at ops, or changes what they mean, is asked for first, and sees them through the dispatcher as ever:
``torch.compile``, modes, transforms, subclasses of tensors, the profiler. A call's arguments are looked at in C++, with
which the CPU's kernels come: without them every call is the dispatcher's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

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

_TENSORS = ("Tensor", "Optional[Tensor]")
_TENSOR_LIST = "List[Tensor]"

#: How a call goes: through the dispatcher, past it, or past it with a gradient, which tensors in lists may want too.
DISPATCHED, DIRECT, DIRECT_WITH_GRADIENT, DIRECT_WITH_GRADIENT_IN_LISTS = range(4)

_cpu, _ = _native.cpu()
_look = _cpu.look if _cpu is not None else None


class Op(Protocol):
    """An op to be called with positional arguments.

    Attributes:
        dispatched: as torch knows it.
        by: ``by(way, args)`` is the call whose way is known.
    """

    dispatched: torch._ops.OpOverload
    by: Callable[[int, tuple[Any, ...]], Any]

    def __call__(self, *args: Any) -> Any: ...


def direct(
    dispatched: torch._ops.OpOverload,
    implementation: Callable[..., Any],
    save: Callable[..., Any] | None,
    gradient: Callable[..., Any] | None,
) -> Op:
    """An op that is called by its implementation where it can be, else as torch dispatches it.

    Args:
        dispatched: the registered op.
        implementation: what computes it from the same arguments.
        save, gradient: as in :func:`gdl_kernels._registration.register`.
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

    def by(way: int, args: tuple[Any, ...]) -> Any:
        if way == DISPATCHED:
            return dispatched(*args)
        for place in floats:
            if type(args[place]) is not float:  # the dispatcher too makes it one
                args = (*args[:place], float(args[place]), *args[place + 1 :])
        if way == DIRECT:
            return implementation(*args)
        return with_gradient(*args) if way == DIRECT_WITH_GRADIENT else with_gradient_in_lists(*args)

    def call(*args: Any) -> Any:
        return by(way_of(schema.name, args), args)

    op = cast(Op, call)
    op.dispatched, op.by = dispatched, by
    return op


def way_of(name: str, args: tuple[Any, ...]) -> int:
    """How a call of an op goes with its arguments, the last of which is the backend's name.

    If not through the dispatcher, nothing looks at what is done with them, and their memory is where the tensors are.

    Raises:
        NotImplementedError: if an argument has a tangent.
    """
    if _is_compiling():
        return DISPATCHED
    if forward_ad._current_level >= 0:
        _refuse_tangents(name, args)
    if (
        _look is None
        or _included().raw_repr() | _NOT_IN_INFERENCE != _NOTHING_ON
        or _function_mode_is_on()
        or _profiler_is_on()
    ):
        return DISPATCHED
    way: int = _look(args, _gradients_are_on())  # csrc/bindings_cpu_calls.cpp
    return DIRECT if way > DIRECT and _excluded(_AUTOGRAD) else way


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
    types = [str(t.type) for t in schema.arguments]
    gives = [str(t.type) == _TENSOR_LIST for t in schema.returns]

    def forward(ctx: Any, lists: _Lists, args: tuple[Any, ...], *_flat: Any) -> tuple[Any, ...]:
        out = implementation(*args)
        save(ctx, args, out)
        flat_out, lists.outputs = _flattened(out if len(gives) > 1 else (out,), gives)
        ctx.lists, ctx.needs_input_grad = lists, lists.needed
        return tuple(flat_out)

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        found = gradient(ctx, *_nested(grads, ctx.lists.outputs))
        flat: list[Any] = [None, None]
        for grad, kind, length in zip(found if len(types) > 1 else (found,), types, ctx.lists.args):
            if length is None:
                flat.append(None if kind == _TENSOR_LIST else grad)
            else:
                flat += grad
        return tuple(flat)

    apply = _apply(dispatched, forward, backward)

    def call(*args: Any) -> Any:
        lists = _Lists()
        flat: list[Any] = []
        for arg, kind in zip(args, types):
            length = None
            if kind == _TENSOR_LIST:
                needed = [t.requires_grad for t in arg]
                lists.needed.append(needed)
                if True in needed:
                    flat += arg
                    length = len(arg)
            else:
                lists.needed.append(kind in _TENSORS and arg is not None and arg.requires_grad)
            if length is None:
                flat.append(arg)
            lists.args.append(length)
        out = _nested(apply(lists, args, *flat), lists.outputs)
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
        needed: of each argument whether it requires a gradient, of a list which of its tensors do.
        outputs: as ``args``, once the outputs are there.
    """

    outputs: list[int | None]

    def __init__(self) -> None:
        self.args: list[int | None] = []
        self.needed: list[bool | list[bool]] = []


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
