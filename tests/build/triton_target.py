"""Compiles Triton kernels for GPUs that need not be here, by their launchers as they are."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from gdl_kernels import _tuned

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

#: The most shared memory a block may have: A100, Hopper, Blackwell.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

#: The tensor core instruction of each.
PRODUCT = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}

#: What was launched: the kernel's name and what Triton compiled.
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


@contextmanager
def compiled_for(arch: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiled]:
    """Launchers run by their own choices, up to the launch: what they would have launched comes here."""
    kernels: Compiled = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        assert grid[0] > 0
        kernels.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **options)))

    driver.set_active(Target(arch))
    try:
        # What a table says was measured on the GPU that it is for.
        with monkeypatch.context() as patch, _tuned.using(None):
            patch.setattr(JITFunction, "run", compile_only)
            yield kernels
    finally:
        if torch.cuda.is_available():  # without a GPU there is no driver to go back to
            driver.reset_active()


def variants(compiled: Compiled) -> dict[str, dict[str, Any]]:
    """By kernel, what its launches compiled, by Triton's own key."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, kernel in compiled:
        found[name][kernel.hash] = kernel
    return found


def resource_usage(kernel: Any, folder: Path) -> dict[str, int]:
    """REG, STACK and LOCAL, of a thread."""
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    listing = subprocess.check_output([CUOBJDUMP, "--dump-resource-usage", path], text=True)
    usage = {name: int(amount) for name, amount in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing)}
    assert len(usage) == 3, listing
    return usage
