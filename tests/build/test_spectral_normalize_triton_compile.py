"""The Triton kernels of spectral_normalize, compiled for GPUs that need not be here: shared memory, spills, loads."""

from __future__ import annotations

import os
import re
import subprocess
from collections import defaultdict
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

KERNELS = {"_products", "_merge", "_finish", "_divide", "_inner_products", "_gradients"}

#: 8 bytes at a time or more: in 16 bit a program's tile gives a thread no more.
LOADS = r"ld\.global\.v[24]\.b32"

#: By kernel, what its launches compiled, by Triton's own key.
Compiled = dict[str, dict[str, Any]]


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


@pytest.fixture
def compiled(target: int, monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """The launchers run as they are, up to the launch: compiled is what they would have launched."""
    kernels: Compiled = defaultdict(dict)
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        assert grid[0] > 0
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        kernels[self.fn.__name__][kernel.hash] = kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)
    return kernels


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
    ("target", "dtype"),
    [(80, torch.float32), (90, torch.float32), (90, torch.bfloat16), (90, torch.float16), (100, torch.float32)],
    indirect=["target"],
    ids=str,
)
def test_resources(target: int, dtype: torch.dtype, compiled: Compiled, tmp_path: Path) -> None:
    launch_all([(1536, 13824), (24576, 20), (96, 27), (96, 864)], dtype)
    assert set(compiled) == KERNELS
    for name, variants in compiled.items():
        vectors = False
        for kernel in variants.values():
            assert kernel.metadata.shared <= 48 * 1024, f"{name}: {kernel.metadata.shared} bytes of shared memory"
            cubin = tmp_path / f"{name}.cubin"
            cubin.write_bytes(kernel.asm["cubin"])
            listing = subprocess.check_output([CUOBJDUMP, "--dump-resource-usage", cubin], text=True)
            usage = {key: int(amount) for key, amount in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing)}
            assert len(usage) == 3, listing
            assert usage["STACK"] == usage["LOCAL"] == 0, f"{name} spills: {usage}"
            vectors |= re.search(LOADS, kernel.asm["ptx"]) is not None
            assert "atom." not in kernel.asm["ptx"], f"{name} is not deterministic"
        if name in ("_products", "_divide", "_inner_products"):
            assert vectors, f"{name} loads one number at a time"


@pytest.mark.parametrize("target", [90], indirect=True)
def test_other_shapes_compile_nothing(compiled: Compiled) -> None:
    launch_all([(64, 512), (64, 16), (64, 300), (64, 17)], torch.float32)
    launch_all([(3, 5)], torch.float32)  # not a multiple of 16 numbers
    before = {name: set(variants) for name, variants in compiled.items()}
    launch_all([(1000, 4096), (31, 48), (7, 331), (1, 5), (24576, 20), (5, 13824)], torch.float32)
    assert {name: set(variants) for name, variants in compiled.items()} == before
