"""Layouts by name, from plain data such as a model's configuration keeps."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch

from ._layout import Layout
from ._patterns import causal as dense_causal
from ._patterns import fixed, full, local, sliding_with_sinks, strided

#: What makes a layout: called as ``build(n, causal=..., **arguments)``.
Pattern = Callable[..., Layout]


def _sliding_with_sinks(n: int, window: int, sinks: int, *, causal: bool, block_size: int = 64) -> Layout:
    if not causal:
        raise ValueError("the pattern 'sliding_with_sinks' is causal, and this model's attention is not")
    return sliding_with_sinks(n, window, sinks, block_size=block_size)


_OWN: dict[str, Pattern] = {
    "local": local,
    "strided": strided,
    "fixed": fixed,
    "sliding_with_sinks": _sliding_with_sinks,
}
_registered: dict[str, Pattern] = {}


def named(
    n: int,
    entry: Mapping[str, Any] | None,
    *,
    causal: bool = True,
    device: torch.device | str = "cpu",
    argument: str = "entry",
) -> Layout:
    """The layout of ``n`` positions that plain data describes; the last 64 are kept, and the same call gives the same.

    Args:
        entry: ``{"pattern": "fixed", "stride": 128, "summary": 32}``: one of ``local``, ``strided``, ``fixed``,
            ``sliding_with_sinks`` or what :func:`register_pattern` knows, and its arguments but ``n`` and ``causal``;
            None is every position, or with ``causal`` every earlier one.
        causal: whether the model's attention is.
        argument: what an error calls ``entry``.

    Raises:
        ValueError: if ``entry`` has another form, an argument of the pattern is missing, unknown or out of range, or
            the pattern does not give ``n`` positions or is not causal where the model is.
        TypeError: if an argument is of another type.
    """
    if entry is None:
        return _dense(n, causal, torch.device(device))
    check_entry(entry, argument)
    name = entry["pattern"]
    arguments = json.dumps({key: value for key, value in entry.items() if key != "pattern"}, sort_keys=True)
    pattern = _OWN.get(name) or _registered[name]
    return _built(pattern, name, arguments, n, causal, torch.device(device), argument)


def register_pattern(name: str, build: Pattern) -> None:
    """Give a pattern a name for :func:`named`; one of that name that was registered before goes.

    Args:
        name: the ``"pattern"`` of an entry.
        build: called as ``build(n, causal=..., **arguments)`` with the entry's arguments; gives a layout of ``n``
            positions. A causal one serves shorter sequences too: what a row keeps may not hang on ``n``.

    Raises:
        ValueError: if ``name`` is a pattern of this package.
        TypeError: if ``name`` is no string or ``build`` can't be called.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}")
    if not callable(build):
        raise TypeError(f"build must be callable, got {type(build).__name__}")
    if name in _OWN:
        raise ValueError(f"name must not be a pattern of gdl_kernels, {', '.join(_OWN)}, got {name!r}")
    _registered[name] = build


def check_entry(entry: Any, argument: str = "entry") -> None:
    """Raise a ValueError if ``entry`` is not of the form that :func:`named` takes.

    Whether its arguments are right is the pattern's to say.
    """
    known = [*_OWN, *_registered]
    if not isinstance(entry, Mapping) or entry.get("pattern") not in known:
        wanted = f'{{"pattern": one of {", ".join(known)}, ...its arguments}}'
        raise ValueError(f"{argument} must be {wanted}, got {entry!r}")
    if "causal" in entry:
        raise ValueError(f"{argument} must not say 'causal': the model does; got {entry!r}")


# What is built while decoding in inference mode has to serve training, too: autograd keeps no inference tensors.
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _dense(n: int, causal: bool, device: torch.device) -> Layout:
    return (dense_causal(n) if causal else full(n)).to(device)


@lru_cache(maxsize=64)  # by the function too: a name may be given to another
@torch.inference_mode(False)
def _built(
    pattern: Pattern, name: str, arguments: str, n: int, causal: bool, device: torch.device, argument: str
) -> Layout:
    try:
        call = inspect.signature(pattern).bind(n, causal=causal, **json.loads(arguments))
    except TypeError as error:
        raise ValueError(f"{argument}: the pattern {name!r} has other arguments: {error}") from error
    layout = pattern(*call.args, **call.kwargs)
    if not isinstance(layout, Layout) or (layout.n_q, layout.n_k) != (n, n):
        raise ValueError(f"{argument}: the pattern {name!r} must give a layout of {n} positions, got {layout!r}")
    if causal and not layout.causal:
        raise ValueError(f"{argument}: the pattern {name!r} sees later positions, and this model's attention is causal")
    return layout.to(device)
