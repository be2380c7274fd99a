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
    kind = (kernel.fn, *map(type, args))
    arguments = _arguments.get(kind)
    if arguments is None:
        arguments = _arguments[kind] = _Arguments(kernel, args)
    if not arguments.known:
        return kernel[(programs,)](*args, **constants)
    device = driver.active.get_current_device()
    # Triton adds these two to the options of a launch.
    options = knobs.runtime.debug, knobs.compilation.instrumentation_mode
    key = (device, options, *constants, *constants.values(), *arguments.variant(args))
    warm = arguments.warm.get(key)
    if warm is None:
        compiled = kernel[(programs,)](*args, **constants)
        # None where nothing is compiled for a launch. AMD's variants tell more tensors apart.
        if isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == "cuda":
            rest = tuple(constants[name] for name in kernel.arg_names[len(args) :])
            arguments.warm[key] = _Warm(compiled, compiled.run, compiled.function, compiled.packed_metadata, rest)
        return compiled
    stream = driver.active.get_current_stream(device)
    warm.run(programs, 1, 1, stream, warm.function, warm.metadata, None, None, None, *args, *warm.constants)
    return warm.compiled


def _is_watched(kernel: Any) -> bool:
    """Whether somebody asked Triton to be told of launches, as its profiler does, or to compile in another way."""
    runtime = knobs.runtime
    told = runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls or kernel.pre_run_hooks
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


class _Arguments:
    """The arguments of a kernel, of given types, and what it was compiled to for them.

    Attributes:
        known: whether all of the types are known here.
        warm: by device, options, constants and what :meth:`variant` says.
    """

    def __init__(self, kernel: Any, args: tuple[Any, ...]) -> None:
        self.known = True
        self.warm: dict[tuple[Any, ...], _Warm] = {}
        # Where there are tensors with variants by alignment, and without; numbers with variants by value, and without.
        # What is in a tuple has all variants, whatever its kernel asks. Of a float and of None there is but one.
        self.aligned: list[int] = []
        self.loose: list[int] = []
        self.numbers: list[int] = []
        self.free: list[int] = []
        self.tensor_tuples: list[int] = []
        self.number_tuples: list[int] = []
        self.descriptors: list[int] = []
        for i, (param, arg) in enumerate(zip(kernel.params, args)):
            if isinstance(arg, Tensor):
                loose = param.do_not_specialize or param.do_not_specialize_on_alignment
                (self.loose if loose else self.aligned).append(i)
            elif isinstance(arg, tuple) and all(isinstance(item, Tensor) for item in arg):
                self.tensor_tuples.append(i)
            elif isinstance(arg, tuple) and all(type(item) is int for item in arg):
                self.number_tuples.append(i)
            elif type(arg) is int:
                (self.free if param.do_not_specialize else self.numbers).append(i)
            elif type(arg) is TensorDescriptor:
                self.descriptors.append(i)
            elif type(arg) is not float and arg is not None:
                self.known = False

    def variant(self, args: tuple[Any, ...]) -> list[Any]:
        """All that Triton tells variants apart by, and hardly more: a new length is as warm as an old one."""
        found: list[Any] = [_variants(tuple([args[i] for i in self.numbers]))]
        aligned = [args[i] for i in self.aligned]
        for i in self.tensor_tuples:
            aligned += args[i]
            found.append(len(args[i]))
        found += [x.dtype if x.data_ptr() % 16 == 0 else (x.dtype,) for x in aligned]
        found += [args[i].dtype for i in self.loose]
        found += [_variants(args[i]) for i in self.number_tuples]
        found += [(args[i].base.dtype, *args[i].block_shape) for i in self.descriptors]
        free = [args[i] for i in self.free]
        if free and not -(2**31) <= min(free) <= max(free) < 2**31:
            found.append(tuple(number.bit_length() for number in free))  # 64 bits long, or unsigned
        return found


#: By a kernel's function and the types of the arguments.
_arguments: dict[tuple[Any, ...], _Arguments] = {}


@functools.lru_cache(maxsize=4096)
def _variants(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """What a kernel is compiled for of numbers: whether one is 1, whether 16 divides it, whether it has 32 bits."""
    return tuple((1 if n == 1 else 0 if n % 16 else 16) if -(2**31) <= n < 2**31 else n for n in numbers)


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
