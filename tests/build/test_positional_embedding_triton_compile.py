"""The Triton kernels of positional_embedding, compiled for GPUs that need not be here: spills, width of accesses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton_target import compiled_for, resource_usage

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

#: Of a thread: with aligned rows seven blocks of four warps share a multiprocessor, with any other three.
ALIGNED_REGISTERS, MAX_REGISTERS = 72, 136


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [
        ((32, 512), 37_000, 512),  # the Transformer's
        ((3, 5, 700), 11, 37),  # divides nothing
    ],
    ids=str,
)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_resources(
    arch: int,
    shape: tuple[int, ...],
    rows: int,
    columns: int,
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gdl_kernels.ops.positional_embedding import triton as kernels

    tokens, weight = torch.zeros(shape, dtype=torch.int64), torch.empty(rows, columns, dtype=dtype)
    out = torch.empty(*shape, columns, dtype=dtype)
    with compiled_for(arch, monkeypatch) as compiled:
        kernels.forward(out, tokens, weight, 0.5, 3, "triton")
        kernels.backward(torch.empty_like(weight), out, tokens, rows, 0.5, "triton")
    assert [name for name, _ in compiled] == ["_forward", "_sum_chunks", "_sum_rows"]
    for name, kernel in compiled:
        usage = resource_usage(kernel, tmp_path)
        assert usage["STACK"] == usage["LOCAL"] == 0, f"{name} spills: {usage}"
        assert usage["REG"] <= (ALIGNED_REGISTERS if columns == 512 else MAX_REGISTERS), f"{name}: {usage}"
        assert kernel.metadata.shared <= 16 * 1024, f"{name}: {kernel.metadata.shared} bytes of shared memory"
        assert "atom." not in kernel.asm["ptx"], f"{name} is not deterministic"
    if columns == 512:
        for name, kernel in compiled:
            assert "ld.global.v4.b32" in kernel.asm["ptx"], f"{name} does not read in 16 bytes"
        assert "st.global.v4.b32" in compiled[0][1].asm["ptx"], "out is not written in 16 bytes"


@pytest.mark.parametrize("arch", [90])
def test_other_lengths_and_starts_compile_nothing(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from gdl_kernels.ops.positional_embedding import triton as kernels

    weight, hashes = torch.empty(300, 512), []
    with compiled_for(arch, monkeypatch) as compiled:
        for shape, start in (((2, 64), 0), ((1, 127), 1), ((7, 4096), 16), ((3, 801), 10**6)):
            out, tokens = torch.empty(*shape, 512), torch.zeros(shape, dtype=torch.int64)
            kernels.forward(out, tokens, weight, 0.5, start, "triton")
            kernels.backward(torch.empty_like(weight), out, tokens, 300, 0.5, "triton")
            hashes.append([kernel.hash for _, kernel in compiled])
            compiled.clear()
    assert all(same == hashes[0] for same in hashes)
