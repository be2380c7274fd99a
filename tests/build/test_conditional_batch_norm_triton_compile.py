"""The Triton kernels of conditional_batch_norm, compiled for GPUs that need not be here: spills, width of accesses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="triton is not installed")

from tests.build.triton_target import Compiled, compiled_for, resource_usage

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

#: What walks memory, and has many blocks.
PASSES = ("_moments", "_sums", "_combine")

#: Of four warps: with so many registers a thread, four blocks share a multiprocessor.
MAX_REGISTERS = 128


class NothingIsComputed(TorchDispatchMode):
    """But by our own kernels: memory and views of it are all that torch is asked for."""

    ALLOWED = (torch.ops.aten.empty, torch.ops.aten.new_empty, torch.ops.aten.select, torch.ops.aten.unbind)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket in self.ALLOWED, f"{func} is a launch"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    from gdl_kernels.ops.conditional_batch_norm.triton import kernels

    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 132)
    with compiled_for(request.param, monkeypatch) as launched:
        yield launched


SHAPES = [
    ((8, 1536, 4, 4), torch.contiguous_format),  # BigGAN's first layer
    ((8, 96, 128, 128), torch.contiguous_format),  # and its last
    ((8, 192, 64, 64), torch.channels_last),
]
ODD_SHAPES = [
    ((3, 5, 7, 9), torch.contiguous_format),  # divides nothing
    ((3, 1, 1, 1), torch.contiguous_format),  # sizes of 1 are constants to Triton
]


@pytest.mark.parametrize(
    ("compiled", "shape", "memory_format", "dtype"),
    [(arch, *shape, dtype) for arch in (80, 90, 100) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)]
    + [(90, *shape, torch.float32) for shape in ODD_SHAPES],
    indirect=["compiled"],
    ids=str,
)
def test_resources(
    compiled: Compiled,
    shape: tuple[int, ...],
    memory_format: torch.memory_format,
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    from gdl_kernels.ops.conditional_batch_norm import triton as launchers

    x, v, grad, out, second_out = (torch.empty(shape, dtype=dtype).to(memory_format=memory_format) for _ in range(5))
    gain = torch.empty(shape[:2], dtype=dtype)
    statistics = torch.empty(3, shape[1])
    running = torch.empty(2, shape[1]).unbind()
    end = 1e-5, "", "triton"
    with NothingIsComputed():
        launchers.forward((out, statistics), x, gain, gain, None, None, *end)
        launchers.forward((out, statistics), x, gain, gain, *running, *end)
        for training in (True, False):
            launchers.backward((out, gain, gain), grad, x, gain, statistics, training, *end)
        for training in (True, False):
            call = grad, x, gain, statistics, training, *end
            launchers.double_backward((out, second_out, gain), v, gain, gain, *call)
    names = ["_moments", "_merge", "_combine", "_combine", *2 * ["_sums", "_add", "_combine"]]
    names += ["_sums", "_add", "_weights", "_combine", "_combine", "_sums", "_add", "_combine", "_combine"]
    assert [name for name, _ in compiled] == names
    for name, kernel in compiled:
        usage = resource_usage(kernel, tmp_path)
        assert usage["STACK"] == usage["LOCAL"] == 0, f"{name} spills: {usage}"
        assert usage["REG"] <= MAX_REGISTERS or name not in PASSES, f"{name}: {usage}"
        assert kernel.metadata.shared <= 32 * 1024, f"{name}: {kernel.metadata.shared} bytes of shared memory"
    if shape[1] % 16 == 0:  # every line is aligned
        wide = "ld.global.v4.b32"
        for name, kernel in compiled:
            if name in PASSES:
                assert wide in kernel.asm["ptx"], f"{name} does not read 16 bytes at a time"
            if name == "_combine":
                assert "st.global.v4.b32" in kernel.asm["ptx"], "out is not written 16 bytes at a time"
