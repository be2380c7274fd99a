"""The Triton kernels of minibatch_stddev, compiled for GPUs that need not be here: spills, width of accesses."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

#: With so many a thread, four blocks of four warps share a multiprocessor. Aligned lines take half as many.
MAX_REGISTERS = 128

Compiled = list[tuple[str, Any]]


class Target:
    """What Triton asks its driver before it compiles, answered for a GPU that is not here."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return -self.arch  # Triton keeps its compiled kernels by device: this one is nobody's

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    """The launchers run as they are, up to the launch: compiled is what they would have launched."""
    kernels: Compiled = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        assert grid[0] > 0
        kernels.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **options)))

    monkeypatch.setattr(JITFunction, "run", compile_only)
    driver.set_active(Target(request.param))
    try:
        yield kernels
    finally:
        if torch.cuda.is_available():  # without a GPU there is no driver to go back to
            driver.reset_active()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "group_size", "memory_format"),
    [
        ((16, 512, 4, 4), 4, torch.contiguous_format),  # ProGAN's
        ((16, 64, 64, 64), 4, torch.channels_last),
        ((9, 15, 7, 9), 3, torch.contiguous_format),  # divides nothing
        ((32, 16, 8, 8), 32, torch.contiguous_format),  # a large group
    ],
    ids=str,
)
@pytest.mark.parametrize("compiled", [80, 90, 100], indirect=True)
def test_resources(
    compiled: Compiled,
    shape: tuple[int, ...],
    group_size: int,
    memory_format: torch.memory_format,
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    from gdl_kernels.ops.minibatch_stddev import triton as kernels

    x = torch.empty(shape, dtype=dtype).to(memory_format=memory_format)
    y = torch.empty(shape[0], shape[1] + 1, *shape[2:], dtype=dtype).to(memory_format=memory_format)
    kernels.forward(y, x, group_size, 1, 1e-8, "triton")
    kernels.backward(torch.empty_like(x), y, x, group_size, 1, 1e-8, "triton")
    assert [name for name, _ in compiled] == ["_copy_and_sum", "_fill", "_sum_of_statistic", "_grad_input"]
    for name, kernel in compiled:
        usage = resource_usage(kernel.asm["cubin"], tmp_path / f"{name}.cubin")
        assert usage["STACK"] == usage["LOCAL"] == 0, f"{name} spills: {usage}"
        assert usage["REG"] <= MAX_REGISTERS, f"{name}: {usage}"
        assert kernel.metadata.shared <= 16 * 1024, f"{name}: {kernel.metadata.shared} bytes of shared memory"
    if shape == (16, 512, 4, 4):  # every line is aligned
        copy = compiled[0][1].asm["ptx"]
        assert "ld.global.v4.b32" in copy, "x is not read in 16 bytes"
        assert "st.global.v4.b32" in copy, "y is not written in 16 bytes"


def resource_usage(cubin: bytes, path: Path) -> dict[str, int]:
    path.write_bytes(cubin)
    listing = subprocess.check_output([CUOBJDUMP, "--dump-resource-usage", path], text=True)
    usage = {name: int(amount) for name, amount in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing)}
    assert len(usage) == 3, listing
    return usage
