"""Checks every kernel that this machine can run, on fresh random numbers, against float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from . import _backends, _native

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Selection:
    """What is checked, and how.

    Attributes:
        seed: of the random inputs.
        ops, backends, dtypes: by name; None for all.
        poison: fill memory that kernels are to write with NaN first, so that what they forget is seen. Without it, a
            tool that looks for reads of memory that nobody wrote can see those.
    """

    seed: int
    ops: Collection[str] | None = None
    backends: Collection[str] | None = None
    dtypes: Collection[str] | None = None
    poison: bool = True


@dataclass(frozen=True)
class Check:
    """One example of one op on one backend in one dtype.

    Attributes:
        what: the output or gradient that came closest to its allowance or went furthest past it.
        error: its largest error.
        allowed: twice that of plain PyTorch in the same dtype, and some units in the last place.
        verdict: "right", "wrong", "raised", or "can't" where the backend doesn't serve such a call.
        why: what was raised, or why the backend doesn't serve it.
    """

    op: str
    example: str
    backend: str
    dtype: str
    what: str = ""
    error: float = 0.0
    allowed: float = 0.0
    verdict: str = "right"
    why: str = ""

    @property
    def wrong(self) -> bool:
        return self.verdict in ("wrong", "raised")


def not_run(selection: Selection) -> dict[tuple[str, str], str]:
    """By op and backend, why kernels of ours can't run on this machine."""
    return {
        (name, backend): "; ".join(missing)
        for name, choices in _backends.ops().items()
        for backend in choices.reasons
        if _has(selection.ops, name) and _has(selection.backends, backend) and (missing := _native.missing(backend))
    }


def checks(selection: Selection) -> Iterator[Check]:
    """Check ops on each backend that runs here, in each dtype, forward and backward."""
    skipped = not_run(selection)
    for name, choices in _backends.ops().items():
        backends = [b for b in choices.reasons if _has(selection.backends, b) and (name, b) not in skipped]
        if not backends or not _has(selection.ops, name):
            continue
        with torch.random.fork_rng():
            torch.manual_seed(selection.seed)
            examples = list(choices.examples())
        for backend in backends:
            for example in examples:
                for dtype in DTYPES:
                    if _has(selection.dtypes, name_of(dtype)):
                        yield _check(choices, example, backend, dtype, selection)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _has(chosen: Collection[str] | None, name: str) -> bool:
    return chosen is None or name in chosen


def _check(
    choices: _backends.Choices, example: _backends.Example, backend: str, dtype: torch.dtype, selection: Selection
) -> Check:
    import gdl_kernels

    seed = selection.seed
    function = getattr(gdl_kernels, choices.op)
    device = torch.device("cpu" if backend == "cpu" or not torch.cuda.is_available() else "cuda")
    row = Check(choices.op, example.name, backend, name_of(dtype))
    try:
        args, kwargs, _ = _prepared(example, device, dtype, dtype)
        if reasons := choices.why_not(backend, *args, **kwargs):
            return replace(row, verdict="can't", why="; ".join(reasons))
        with _poisoned_memory() if selection.poison else nullcontext():
            ours = _run(function, example, backend, device, dtype, dtype, seed)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a kernel's faults show here at the latest
        plain = _run(function, example, "reference", device, dtype, dtype, seed)
        exact = _run(function, example, "reference", torch.device("cpu"), dtype, torch.float64, seed)
    except Exception as error:  # whatever a broken kernel raises belongs in the table, beside the others
        return replace(row, verdict="raised", why=f"{type(error).__name__}: {error}")
    results = ((_compare(ours[what], plain[what], exact[what], dtype, what, example.lifted), what) for what in ours)
    (share, largest, allowed), what = max(results)
    return replace(row, what=what, error=largest, allowed=allowed, verdict="right" if share <= 1 else "wrong")


def _prepared(
    example: _backends.Example, device: torch.device, rounded: torch.dtype, dtype: torch.dtype
) -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]:
    """The example's arguments on a device, rounded to one dtype and held in another, and those to differentiate by."""
    leaves = []

    def prepare(value: Any) -> Any:
        if isinstance(value, Tensor) and value.requires_grad:
            leaves.append(value.detach().to(rounded).to(device, dtype).requires_grad_())
            return leaves[-1]
        if isinstance(value, Tensor):
            return value.to(device, copy=True)  # running statistics are written to
        return value.to(device) if hasattr(value, "to") else value

    args, kwargs = tree_map(prepare, (example.args, dict(example.kwargs)))
    return args, kwargs, leaves


def _run(
    function: Callable[..., Any],
    example: _backends.Example,
    backend: str,
    device: torch.device,
    rounded: torch.dtype,
    dtype: torch.dtype,
    seed: int,
) -> dict[str, Tensor]:
    args, kwargs, leaves = _prepared(example, device, rounded, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for dropout: every backend drops the same
        outputs = function(*args, **kwargs, backend=backend)
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    differentiable = [output for output in outputs if output.requires_grad]
    generator = torch.Generator().manual_seed(seed + 1)  # not the inputs again
    cotangents = [
        torch.randn(output.shape, generator=generator).to(rounded).to(device, output.dtype) for output in differentiable
    ]
    first = torch.autograd.grad(differentiable, leaves, cotangents, create_graph=True)
    again = [torch.randn(g.shape, generator=generator).to(rounded).to(device, g.dtype) for g in first]
    # The gradient of a bias depends on nothing that is differentiated by, and nothing on a bias.
    dependent = [(gradient, v) for gradient, v in zip(first, again) if gradient.requires_grad]
    second = torch.autograd.grad(
        [gradient for gradient, _ in dependent], leaves, [v for _, v in dependent], materialize_grads=True
    )
    named = {f"output {i}": output for i, output in enumerate(outputs)}
    named |= {f"gradient {i}": gradient for i, gradient in enumerate(first)}
    return named | {f"second gradient {i}": gradient for i, gradient in enumerate(second)}


def _compare(
    ours: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype, what: str, lifted: int
) -> tuple[float, float, float]:
    """Largest error as a share of what is allowed; error; allowed."""
    if ours.shape != plain.shape or ours.dtype != plain.dtype:
        return torch.inf, torch.inf, 0.0
    ours, plain, exact = (tensor.detach().double().cpu() for tensor in (ours, plain, exact))
    finite = exact.isfinite()
    if not ours[finite].isfinite().all() or not torch.equal(ours[~finite], exact[~finite]):
        return torch.inf, torch.inf, 0.0
    if not finite.any():
        return 0.0, 0.0, 0.0
    error = (ours - exact)[finite].abs().max().item()
    # Sums of few terms plain PyTorch may have exactly, by luck: in float32, where it is close to that, some more
    # rounding steps are allowed. In float64 it is the judge, and how far off it is itself is not known.
    ulps = {torch.float64: 256, torch.float32: 16}.get(dtype, 1)
    if what.startswith("second"):
        ulps *= 8  # its terms cancel several times over
    floor = lifted * ulps * torch.finfo(dtype).eps * exact[finite].abs().max().item()
    allowed = 2 * (plain - exact)[finite].abs().max().item() + floor
    return (error / allowed if allowed else torch.inf * error if error else 0.0), error, allowed


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that what a kernel forgets to write is seen."""
    was_on = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=warn_only)
