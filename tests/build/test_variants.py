"""Which CPU module is loaded, and that the native modules ask nothing of the machine that it may not have."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from installation import ROOT, copy_small_tree, environment, make_target, run

from gdl_kernels import _native

#: torch's name for what each capability needs, in rising order.
CAPABILITIES = ["DEFAULT", "AVX2", "AVX512"]

CHECK = """
import torch
from gdl_kernels import _native
module, reason = _native.cpu()
assert module is not None, reason
print(module.__name__)
"""


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_capability_picks_the_module(capability: str) -> None:
    here = torch.backends.cpu.get_cpu_capability()
    if here not in CAPABILITIES or CAPABILITIES.index(here) < CAPABILITIES.index(capability):
        pytest.skip(f"this CPU has {here}, and {capability} is more")
    name = _native.VARIANTS[capability]
    if name == "_cpu_avx512" and torch.cpu._is_avx512_bf16_supported():
        name = _native.BF16_VARIANT
    if not _native.is_built(name):
        pytest.skip(f"{name} is not built: {_native.why_not_built(name)}")
    variables = environment(ATEN_CPU_CAPABILITY=capability.lower(), PYTHONPATH=str(ROOT))
    outcome = subprocess.run([sys.executable, "-c", CHECK], env=variables, capture_output=True, text=True)
    assert outcome.stdout.strip() == f"gdl_kernels.{name}", outcome.stderr


@pytest.mark.parametrize(("name", "forbidden"), [("_cpu_default", r"%[yz]mm\d"), ("_cpu_avx2", r"%zmm\d")])
def test_a_lesser_module_has_no_wider_registers(name: str, forbidden: str) -> None:
    if not _native.is_built(name):
        pytest.skip(f"{name} is not built: {_native.why_not_built(name)}")
    (library,) = Path(_native.__file__).parent.glob(f"{name}.*.so")
    code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", library], capture_output=True, text=True, check=True)
    assert "ret" in code.stdout
    assert not re.search(forbidden, code.stdout)


def test_cuda_sources_build_with_a_cpu_torch(tmp_path: Path) -> None:
    if not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()):
        pytest.skip("nvcc is not on PATH nor in /usr/local/cuda")
    tree, python = copy_small_tree(tmp_path / "tree"), make_target(tmp_path / "target")
    told = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, GDL_KERNELS_CUDA="1")
    assert "_cuda: built" in told
    assert run(python, "-c", "import gdl_kernels._cuda", cwd=tree, PYTHONPATH=str(tree)) == ""
