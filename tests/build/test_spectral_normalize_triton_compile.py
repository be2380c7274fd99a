"""The Triton kernels of spectral_normalize, compiled for GPUs that need not be here: shared memory, spills, loads."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.build.triton_target import compiled_for, resource_usage, variants

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

KERNELS = {"_products", "_merge", "_finish", "_divide", "_inner_products", "_gradients"}

#: 8 bytes at a time or more: in 16 bit a program's tile gives a thread no more.
LOADS = r"ld\.global\.v[24]\.b32"


def launch_all(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    """Forward in both orders with and without steps, and backward."""
    from gdl_kernels.ops.spectral_normalize import op
    from gdl_kernels.ops.spectral_normalize import triton as kernels

    weights = [torch.empty(shape, dtype=dtype) for shape in shapes]
    weights.append(torch.empty(12, 24, 4, 4, dtype=dtype).movedim(1, 0))
    us, vs = ([torch.empty(length(w.shape)) for w in weights] for length in (op._rows, op._columns))
    outputs = op._outputs(weights, us, vs)
    for steps, semantics in ((2, "torch"), (2, "biggan"), (0, "torch")):
        kernels.forward(outputs, weights, us, vs, steps, 1e-12, semantics, "triton")
    kernels.backward(weights, weights, weights, outputs[1], "triton")


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [(80, torch.float32), (90, torch.float32), (90, torch.bfloat16), (90, torch.float16), (100, torch.float32)],
    ids=str,
)
def test_resources(arch: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with compiled_for(arch, monkeypatch) as compiled:
        launch_all([(1536, 13824), (24576, 20), (96, 27), (96, 864)], dtype)
    found = variants(compiled)
    assert set(found) == KERNELS
    for name, kernels in found.items():
        for kernel in kernels.values():
            assert kernel.metadata.shared <= 48 * 1024, f"{name}: {kernel.metadata.shared} bytes of shared memory"
            usage = resource_usage(kernel, tmp_path)
            assert usage["STACK"] == usage["LOCAL"] == 0, f"{name} spills: {usage}"
            assert "atom." not in kernel.asm["ptx"], f"{name} is not deterministic"
        if name in ("_products", "_divide", "_inner_products"):
            vectors = any(re.search(LOADS, kernel.asm["ptx"]) for kernel in kernels.values())
            assert vectors, f"{name} loads one number at a time"


def test_other_shapes_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with compiled_for(90, monkeypatch) as compiled:
        launch_all([(64, 512), (64, 16), (64, 300), (64, 17)], torch.float32)
        launch_all([(3, 5)], torch.float32)  # not a multiple of 16 numbers
        before = {name: set(kernels) for name, kernels in variants(compiled).items()}
        launch_all([(1000, 4096), (31, 48), (7, 331), (1, 5), (24576, 20), (5, 13824)], torch.float32)
    assert {name: set(kernels) for name, kernels in variants(compiled).items()} == before
