"""The Triton kernels of sparse_attention, compiled for GPUs that need not be here: memory, tensor cores, spills."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gdl_kernels import layouts

triton = pytest.importorskip("triton", reason="triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

#: The most shared memory a block may have: A100, Hopper, Blackwell.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


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
def target(request: pytest.FixtureRequest) -> Iterator[int]:
    driver.set_active(Target(request.param))
    try:
        yield request.param
    finally:
        if torch.cuda.is_available():  # without a GPU there is no driver to go back to
            driver.reset_active()


def resource_usage(cubin: bytes, path: Path) -> dict[str, int]:
    path.write_bytes(cubin)
    listing = subprocess.check_output([CUOBJDUMP, "--dump-resource-usage", path], text=True)
    usage = {name: int(amount) for name, amount in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing)}
    assert len(usage) == 3, listing
    return usage


@pytest.mark.parametrize(
    ("target", "dtype", "head_dim", "block_size"),
    [
        (80, torch.bfloat16, 64, 64),
        (80, torch.float16, 128, 128),
        (90, torch.bfloat16, 64, 128),
        (90, torch.bfloat16, 128, 64),
        (90, torch.float16, 128, 128),
        (100, torch.bfloat16, 64, 64),
    ],
    indirect=["target"],
    ids=str,
)
def test_resources(
    target: int, dtype: torch.dtype, head_dim: int, block_size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The launchers run as they are, up to the launch: compiled is what they would have launched."""
    from gdl_kernels.ops.sparse_attention import triton as kernels

    compiled: dict[str, Any] = {}

    def compile_only(
        kernel: Any, programs: int, device: torch.device, num_warps: int, num_stages: int, *args: Any, **constants: Any
    ) -> None:
        assert programs > 0
        compiled[kernel.__name__] = kernel.warmup(
            *args, **constants, grid=(programs,), num_warps=num_warps, num_stages=num_stages
        )

    monkeypatch.setattr(kernels, "_launch", compile_only)
    monkeypatch.setattr(kernels, "_capability", lambda device: target // 10)
    layout = layouts.from_mask(torch.ones(256, 256, dtype=torch.bool).tril(), block_size=block_size).tensors()
    query, key, value, out, grad_out = (torch.empty(2, 4, 256, head_dim, dtype=dtype) for _ in range(5))
    lse = torch.empty(2, 4, 256)
    call = (None, layout, [256, 256, block_size], 0.125, 0, "triton")
    kernels.forward((out, lse), query, key, value, *call)
    kernels.backward((query, key, value), grad_out, None, query, key, value, out, lse, *call)

    assert set(compiled) == {"_forward", "_row_terms", "_grad_query", "_grad_key_value"}
    for name, kernel in compiled.items():
        shared = kernel.metadata.shared
        assert shared <= SHARED_MEMORY[target], f"{name}: {shared} bytes of shared memory"
        usage = resource_usage(kernel.asm["cubin"], tmp_path / f"{name}.cubin")
        assert usage["STACK"] == usage["LOCAL"] == 0, f"{name} spills: {usage}"
        if name == "_row_terms":
            continue
        instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[target]
        assert instruction in kernel.asm["ptx"], f"{name} does not use {instruction}"
        assert "cp.async" in kernel.asm["ptx"], f"{name} is not pipelined"
