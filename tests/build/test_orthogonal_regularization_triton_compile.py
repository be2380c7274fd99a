"""The Triton kernels of orthogonal_regularization, compiled for GPUs that need not be here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.build.triton_target import PRODUCT, SHARED_MEMORY, compiled_for, resource_usage, variants

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


def launch_all(shapes: list[tuple[int, ...]], dtype: torch.dtype, columns: bool) -> None:
    """Value and gradient of a list."""
    from gdl_kernels.ops.orthogonal_regularization import op
    from gdl_kernels.ops.orthogonal_regularization import triton as kernels

    weights = [torch.empty(shape, dtype=dtype) for shape in shapes]
    outputs = op._outputs(weights, 1e-4, columns, True, "triton")
    kernels.forward(outputs, weights, 1e-4, columns, True, "triton")
    kernels.forward((outputs[0], []), weights, 1e-4, columns, False, "triton")
    grads = [torch.empty_like(weight) for weight in weights]
    kernels.backward(grads, outputs[0], weights, outputs[1], 1e-4, columns, "triton")


#: Wide, high, and with rows that are not 16 bytes apart: each a kernel of its own.
SHAPES = [(64, 128), (128, 64), (64, 129), (129, 63)]


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [(80, torch.bfloat16), (90, torch.bfloat16), (90, torch.float16), (90, torch.float32), (100, torch.bfloat16)],
    ids=str,
)
def test_resources(arch: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with compiled_for(arch, monkeypatch) as compiled:
        launch_all(SHAPES, dtype, columns=True)
    found = variants(compiled)
    assert {name: len(kernels) for name, kernels in found.items()} == {
        "_write_addresses": 1, "_gram": 8, "_norms": 2, "_gradient": 4,
    }  # fmt: skip
    for name, kernels in found.items():
        for kernel in kernels.values():
            shared = kernel.metadata.shared
            assert shared <= SHARED_MEMORY[arch], f"{name}: {shared} bytes of shared memory"
            usage = resource_usage(kernel, tmp_path)
            assert usage["STACK"] == usage["LOCAL"] == 0, f"{name} spills: {usage}"
            if name in ("_gram", "_gradient") and dtype != torch.float32:
                assert PRODUCT[arch] in kernel.asm["ptx"], f"{name} does not use {PRODUCT[arch]}"


def test_other_lists_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes, counts and scales are data."""
    generator = torch.Generator().manual_seed(0)
    before: dict[str, set[str]] = {}
    for i in range(20):
        more = torch.randint(1, 300, (i, 2), generator=generator).tolist()
        with compiled_for(90, monkeypatch) as compiled:
            launch_all([*SHAPES, *map(tuple, more)], torch.bfloat16, columns=True)
        after = {name: set(kernels) for name, kernels in variants(compiled).items()}
        assert not before or after == before, f"{len(more)} weights more compiled anew"
        before = after
