"""Which backend serves a call, and why the others do not."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.utils._pytree import tree_leaves

from . import _native

#: Every backend by name. ``reference`` is plain PyTorch and serves every call.
BACKENDS = ("reference", "cpu", "cuda", "triton")

#: What ``auto`` tries on each kind of device, best first, before it falls back to ``reference``.
PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}

#: ``reasons(*args, **kwargs)`` of an op's public call: why the backend can't serve it; empty if it can.
Reasons = Callable[..., list[str]]

#: Kinds of calls whose backend is remembered, some 200 bytes each.
REMEMBERED = 4096

#: What the check of a call finds: the backend that serves it, and what else is the same for all calls of its kind.
Found = TypeVar("Found")

#: By a call's signature, what its check has found.
_served: dict[bytes, Any] = {}

_is_compiling = torch.compiler.is_compiling  # asked in every call

#: Open regions, the innermost last.
_regions: list[tuple[str]] = []
_warned: set[tuple[str, str]] = set()


def _checked(name: str, source: str) -> str:
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{source} must be one of 'auto', {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


_environment = _checked(os.environ.get("GDL_KERNELS_BACKEND", "auto"), "GDL_KERNELS_BACKEND")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one backend for every op called in a region, unless a call names its own.

    The region is the process's, not the thread's: the backward pass, which PyTorch runs in threads of its own, sees
    it too. Under ``backend("reference")`` every op is plain PyTorch.

    Args:
        name: ``"auto"``, ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``.

    Raises:
        ValueError: if there is no such backend.
    """
    region = (_checked(name, "backend"),)
    _regions.append(region)
    try:
        yield
    finally:
        # By identity, not the last: threads may leave their regions in another order than they came.
        del _regions[next(i for i, open_region in enumerate(_regions) if open_region is region)]


@dataclass(frozen=True)
class Example:
    """A small call of an op's public function, on which ``python -m gdl_kernels verify`` checks its kernels.

    Tensors that require a gradient are cast to each dtype and differentiated; the others are passed as they are.
    ``lifted``: how many times over the op amplifies rounding errors on their way to its results.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    lifted: int = 1


#: Makes an op's examples from fresh random numbers.
Examples = Callable[[], Iterable[Example]]


@dataclass(frozen=True)
class Choices:
    """The backends that an op has: for each, a function that says why it can't serve a call."""

    op: str
    reasons: Mapping[str, Reasons]
    examples: Examples

    def serving(self, check: Callable[..., Found], growing: Mapping[str, int] | None = None) -> Callable[..., Found]:
        """``check(backend, *args)``, which checks a call and finds its backend, made once for each kind of call.

        It may look at all that a call's arguments are but for the numbers in tensors: two calls are of a kind when
        their tensors agree in type, dtype, device, sizes, strides and in whether they want a gradient, and the rest of
        their arguments is the same. With others than plain tensors, numbers, strings and dtypes it is made every time.

        ``growing``: by the name of a tensor, a dimension along which it may be longer at every call, as a cache is. Of
        such tensors the check may look at which are of one size there, not at how long they are, and at no strides.
        """
        native, _ = _native.cpu()
        names = list(inspect.signature(check).parameters)[1:]
        signature = native.signature([(growing or {}).get(name, -1) for name in names]) if native is not None else None

        def serving(backend: str | None, *args: Any) -> Found:
            name = backend if backend is not None else _regions[-1][0] if _regions else _environment
            if signature is None or _is_compiling():
                return check(name, *args)
            key = signature(self.op, name, args)
            found = _served.get(key)
            if found is None:
                found = check(name, *args)
                if key is not None:
                    if len(_served) >= REMEMBERED:
                        _served.clear()
                    _served[key] = found
            return found

        return serving

    def pick(self, device: torch.device, requested: str | None, *args: Any, **kwargs: Any) -> str:
        """The name of the backend that serves this call.

        Raises:
            RuntimeError: if a backend was asked for by name and can't serve it; the message has every reason.
        """
        name = requested if requested is not None else _regions[-1][0] if _regions else _environment
        if name == "reference":
            return name
        if name != "auto":
            why = self.why_not(_checked(name, "backend"), *args, **kwargs)
            if why:
                raise RuntimeError(f"backend {name!r} can't serve this {self.op}: {'; '.join(why)}")
            return name
        missed = []
        for candidate in PREFERENCE.get(device.type, ()):
            reasons = self.reasons.get(candidate)
            if reasons is None:
                continue
            why = reasons(*args, **kwargs)
            if not why:
                break
            missed.append(f"{candidate}: {'; '.join(why)}")
        else:
            candidate = "reference"
        if missed:
            why_not = " | ".join(missed)
            warn_once(self.op, f"runs on the slower backend {candidate!r} because of {why_not}")
        return candidate

    def why_not(self, name: str, *args: Any, **kwargs: Any) -> list[str]:
        if name == "reference":
            return []
        if name not in self.reasons:
            return [f"{self.op} has no {name} kernel"]
        return self.reasons[name](*args, **kwargs)


@contextmanager
def picking_anew() -> Iterator[None]:
    """A region in which what was found of earlier calls is not remembered: of each kind the first picks its backend."""
    global _served
    before, _served = _served, {}
    try:
        yield
    finally:
        _served = before


# torch.compile runs it as it traces, so a compiled call says it too.
@torch.compiler.assume_constant_result
def warn_once(op: str, why: str) -> None:
    """Say that a call takes a slower way than its user may expect: the first time, and no second time."""
    if (op, why) not in _warned:
        _warned.add((op, why))
        # Level 6 is the caller of the public function: between are pick, an op's check and serving.
        warnings.warn(f"gdl_kernels: {op} {why}. This is said once.", stacklevel=6)


@dataclass(frozen=True)
class Explanation:
    """What each backend says of one call: ``verdicts[name]`` is "chosen", "can", or why not."""

    op: str
    verdicts: Mapping[str, str]

    def __str__(self) -> str:
        width = max(map(len, self.verdicts))
        return "\n".join([self.op, *(f"  {name:{width}}  {verdict}" for name, verdict in self.verdicts.items())])

    __repr__ = __str__


_ops: dict[str, Choices] = {}


def add_op(op: str, reasons: Mapping[str, Reasons], examples: Examples) -> Choices:
    """Add an op by the name of its public function."""
    _ops[op] = Choices(op, reasons, examples)
    return _ops[op]


def ops() -> Mapping[str, Choices]:
    return _ops


def explain(op: str | Callable[..., Any], *args: Any, backend: str | None = None, **kwargs: Any) -> Explanation:
    """Say which backend a call would use, and why not the others. Nothing is computed.

    Args:
        op: an op's name or its public function.
        args, kwargs: what the op would be called with.

    Returns:
        An :class:`Explanation`; printing it gives a line for each backend.

    Raises:
        ValueError: if there is no such op.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    if name not in _ops:
        raise ValueError(f"op must be one of {', '.join(sorted(_ops))}, got {name!r}")
    choices = _ops[name]
    tensor = next((a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)), None)
    if tensor is None:
        raise ValueError(f"explain({name!r}, ...) needs the tensors that {name} would be called with")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        already = set(_warned)
        try:
            chosen = choices.pick(tensor.device, backend, *args, **kwargs)
        except RuntimeError:
            chosen = None
        _warned.intersection_update(already)  # explaining is not the first call: that one still warns
    verdicts = {}
    for candidate in BACKENDS:
        why = choices.why_not(candidate, *args, **kwargs)
        verdicts[candidate] = "chosen" if candidate == chosen else "; ".join(why) or "can"
    return Explanation(name, verdicts)


def available_backends() -> dict[str, str]:
    """Every backend on this machine: ``"available"``, or the reason why it is not."""
    return {name: "; ".join(_native.missing(name)) or "available" for name in BACKENDS}
