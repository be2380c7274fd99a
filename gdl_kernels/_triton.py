"""What the launchers of Triton kernels share.

``kernel[grid](*args)`` describes each argument to find what it was compiled to, which takes as long as several small
kernels run. :func:`launch` describes them more cheaply, and hands what it launched before to Triton's driver itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

#: Called with what Triton compiled for each launch, None in its interpreter. Tuning looks for spills there.
observers: list[Callable[[Any], None]] = []

#: Whether this Triton is one whose variants and whose driver are known here. Any other finds its kernels itself.
_KNOWN = triton.__version__.startswith(("3.6.", "3.7."))


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, **constants: Any) -> None:
    """Launch a kernel on the current stream of a device.

    Args:
        programs: nothing is launched for none.
        args: the kernel's arguments up to its constants. In a tuple all are whole numbers, or all are tensors.
        constants: what it is compiled for, ``num_warps`` and ``num_stages`` included.
    """
    if not programs:
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            compiled = _launch(kernel, programs, args, constants)
    else:
        compiled = _launch(kernel, programs, args, constants)
    for observe in observers:
        observe(compiled)


def _launch(kernel: Any, programs: int, args: tuple[Any, ...], constants: dict[str, Any]) -> Any:
    if not _KNOWN or not isinstance(kernel, JITFunction) or _is_watched(kernel):
        return kernel[(programs,)](*args, **constants)
    kind = (id(kernel), *map(type, args))
    variants = _variants.get(kind)
    if variants is None:
        variants = _variants[kind] = _Variants(kernel, args)
    if variants.key is None:
        return kernel[(programs,)](*args, **constants)
    gpu = driver.active
    device = gpu.get_current_device()
    # Triton adds the first two to the options of a launch.
    key = (
        knobs.runtime.debug, knobs.compilation.instrumentation_mode, device, *constants, *constants.values(),
        *variants.key(*args),
    )  # fmt: skip
    warm = variants.warm.get(key)
    if warm is None:
        compiled = kernel[(programs,)](*args, **constants)
        # None where nothing is compiled for a launch. AMD's variants tell more tensors apart.
        if isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda":
            rest = tuple(constants[name] for name in kernel.arg_names[len(args) :])
            variants.warm[key] = _Warm(compiled, compiled.run, compiled.function, compiled.packed_metadata, rest)
        return compiled
    compiled, run, function, metadata, rest = warm
    run(programs, 1, 1, gpu.get_current_stream(device), function, metadata, None, None, None, *args, *rest)
    return compiled


def _is_watched(kernel: Any) -> bool:
    """Whether somebody asked Triton to be told of launches, as its profiler does, or to compile in another way."""
    runtime = knobs.runtime
    # These two are chains of hooks, unless somebody put a hook in their place.
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    told = getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or kernel.pre_run_hooks
    return bool(told or runtime.add_stages_inspection_hook)


class _Warm(NamedTuple):
    """A kernel that is compiled and loaded: what Triton's driver takes.

    Attributes:
        constants: those among the kernel's arguments, in their order.
    """

    compiled: Any
    run: Callable[..., None]
    function: int
    metadata: Any
    constants: tuple[Any, ...]


class _Variants:
    """What a kernel is compiled to for arguments of given types.

    Attributes:
        key: all that Triton tells variants apart by, from the arguments, and hardly more: a new length is as warm as an
            old one. None where there is an argument of a type that is not known here.
        warm: by options, device, constants and key.
    """

    def __init__(self, kernel: Any, args: tuple[Any, ...]) -> None:
        self.kernel = kernel  # or its id might become another's
        self.key = _key(kernel, args)
        self.warm: dict[tuple[Any, ...], _Warm] = {}


#: By a kernel's id and the types of the arguments.
_variants: dict[tuple[Any, ...], _Variants] = {}


def _key(kernel: Any, args: tuple[Any, ...]) -> Callable[..., tuple[Any, ...]] | None:
    """``_Variants.key``, written out for these types: a loop over the arguments takes twice as long."""
    parts: list[str] = []
    numbers: list[str] = []
    free: list[str] = []
    for i, (param, arg) in enumerate(zip(kernel.params, args)):
        if isinstance(arg, Tensor):
            parts.append(f"a{i}.dtype")
            if not param.do_not_specialize and not param.do_not_specialize_on_alignment:
                parts.append(f"a{i}.data_ptr() % 16 == 0")
        elif isinstance(arg, tuple) and all(isinstance(item, Tensor) for item in arg):
            parts.append(f"of_tensors(a{i})")  # by alignment, whatever the kernel says
        elif isinstance(arg, tuple) and all(type(item) is int for item in arg):
            parts.append(f"of_numbers(a{i})")
        elif type(arg) is int:
            (free if param.do_not_specialize else numbers).append(f"a{i}")
        elif type(arg) is TensorDescriptor:
            parts.append(f"a{i}.base.dtype, *a{i}.block_shape")
        elif type(arg) is not float and arg is not None:  # of these there is one variant
            return None
    if numbers:
        parts.append(f"of_numbers(({', '.join(numbers)},))")
    if free:
        parts.append(f"of_free_numbers({', '.join(free)})")
    source = f"lambda {', '.join(f'a{i}' for i in range(len(args)))}: ({', '.join(parts)},)"
    names = {"of_tensors": _of_tensors, "of_numbers": _of_numbers, "of_free_numbers": _of_free_numbers}
    key: Callable[..., tuple[Any, ...]] = eval(source, names)
    return key


def _of_tensors(tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return tuple([x.dtype if x.data_ptr() % 16 == 0 else (x.dtype,) for x in tensors])


@functools.lru_cache(maxsize=4096)
def _of_numbers(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """Whether each is 1, whether 16 divides it, whether it has 32 bits."""
    return tuple((1 if n == 1 else 0 if n % 16 else 16) if -(2**31) <= n < 2**31 else n for n in numbers)


def _of_free_numbers(*numbers: int) -> tuple[int, ...] | None:
    """Whether all have 32 bits; else what each has: 32 bits, 64, or 64 without a sign."""
    if min(numbers) >= -(2**31) and max(numbers) < 2**31:
        return None
    return tuple([(n >= 2**63) + (not -(2**31) <= n < 2**31) for n in numbers])


# Triton's own of these go through its constexprs, which takes 3 µs.


def ceil_div(number: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-number // divisor)


def power_of_two(number: int) -> int:
    """The smallest that is as large; 0 for 0."""
    return 1 << (number - 1).bit_length() if number else 0


@functools.cache
def capability(device: torch.device) -> int:
    """As in ``sm_90``."""
    if device.type != "cuda":
        return 90  # the interpreter has no limits
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
