"""Registers ops with torch: schema, fake, kernels and autograd, each said once."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._direct import Op, direct

_library = torch.library.Library("gdl_kernels", "DEF")

#: One output is a tensor, several are a tuple; a tensor list of the schema, ``Tensor[]``, is a list.
Output = Tensor | list[Tensor] | tuple[Tensor | list[Tensor], ...]
#: ``outputs(*args)``: the op's empty outputs, on the device and with the strides that the kernels fill.
Outputs = Callable[..., Output]
#: ``kernel(outputs, *args)``: fills the outputs.
Kernel = Callable[..., None]


def register(
    name: str,
    schema: str,
    *,
    outputs: Outputs,
    kernels: Mapping[str, Kernel],
    save: Callable[..., None] | None = None,
    gradient: Callable[..., Any] | None = None,
) -> Op:
    """Define one op, ``torch.ops.gdl_kernels.<name>``, whose last argument is the backend's name.

    Args:
        schema: ``"(Tensor x, ..., str backend) -> Tensor"``.
        outputs: allocates the outputs. The fake is this function too, so shapes are written once.
        kernels: by backend, the launcher that fills the outputs.
        save: ``save(ctx, inputs, output)``, as torch's ``setup_context``.
        gradient: ``gradient(ctx, *output gradients)``: a gradient for each input. Calls a registered op itself, so
            that it can be differentiated in turn.

    Returns:
        The op, to be called with positional arguments; through the dispatcher where something else needs to see it.
    """
    _library.define(f"{name}{schema}")

    def implementation(*args: Any) -> Output:
        out = outputs(*args)
        backend = args[-1]
        if backend == "cpu":
            _native.cpu_module().prefer_huge_pages(out)
        kernels[backend](out, *args)
        return out

    _library.impl(name, implementation, "CompositeExplicitAutograd")
    qualified = f"gdl_kernels::{name}"
    torch.library.register_fake(qualified, outputs, lib=_library)
    if gradient is not None:
        torch.library.register_autograd(qualified, gradient, setup_context=save, lib=_library)
    return direct(getattr(torch.ops.gdl_kernels, name).default, implementation, save, gradient)


def launchers(package: str | None, name: str, backends: Iterable[str]) -> dict[str, Kernel]:
    """By backend ``<backend>.<name>`` of an op's package.

    A backend's module is imported at its first call: triton need not be installed, and takes a while to import.
    """

    found: dict[str, Kernel] = {}

    def launcher(backend: str) -> Kernel:
        def launch(*args: Any) -> None:
            found[backend] = getattr(importlib.import_module(f".{backend}", package), name)
            found[backend](*args)

        return launch

    found.update((backend, launcher(backend)) for backend in backends)
    return found
