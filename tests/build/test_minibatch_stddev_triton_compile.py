"""The Triton kernels of minibatch_stddev, compiled for GPUs that need not be here: spills, width of accesses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.build.triton_target import compiled_for, resource_usage

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

#: With so many a thread, four blocks of four warps share a multiprocessor. Aligned lines take half as many.
MAX_REGISTERS = 128


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
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_resources(
    arch: int,
    shape: tuple[int, ...],
    group_size: int,
    memory_format: torch.memory_format,
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gdl_kernels.ops.minibatch_stddev import triton as kernels

    x = torch.empty(shape, dtype=dtype).to(memory_format=memory_format)
    y = torch.empty(shape[0], shape[1] + 1, *shape[2:], dtype=dtype).to(memory_format=memory_format)
    with compiled_for(arch, monkeypatch) as compiled:
        kernels.forward(y, x, group_size, 1, 1e-8, "triton")
        kernels.backward(torch.empty_like(x), y, x, group_size, 1, 1e-8, "triton")
    assert [name for name, _ in compiled] == ["_copy_and_sum", "_fill", "_sum_of_statistic", "_grad_input"]
    for name, kernel in compiled:
        usage = resource_usage(kernel, tmp_path)
        assert usage["STACK"] == usage["LOCAL"] == 0, f"{name} spills: {usage}"
        assert usage["REG"] <= MAX_REGISTERS, f"{name}: {usage}"
        assert kernel.metadata.shared <= 16 * 1024, f"{name}: {kernel.metadata.shared} bytes of shared memory"
    if shape == (16, 512, 4, 4):  # every line is aligned
        copy = compiled[0][1].asm["ptx"]
        assert "ld.global.v4.b32" in copy, "x is not read in 16 bytes"
        assert "st.global.v4.b32" in copy, "y is not written in 16 bytes"
