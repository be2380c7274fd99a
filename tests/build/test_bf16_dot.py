"""The kernels that multiply pairs of bfloat16, on any CPU: the instruction is emulated, all the rest is theirs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
import pytest
import torch

ROOT = Path(__file__).parents[2]

CHECK = """
import importlib.util, sys
import torch
from gdl_kernels import _native

spec = importlib.util.spec_from_file_location("_cpu_emulated", sys.argv[1])
emulated = importlib.util.module_from_spec(spec)
spec.loader.exec_module(emulated)
calls = []
def cpu_module():
    calls.append(1)
    return emulated
_native.cpu_module = cpu_module
_native._missing = lambda backend: ""

from tests.ops.sparse_attention_cases import CASES, check
torch.use_deterministic_algorithms(True, warn_only=True)
torch.manual_seed(0)
for case in CASES:
    check(case, torch.bfloat16, "cpu")
assert len(calls) >= 2 * len(CASES)
print("checked", len(CASES))
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH")
def test_bf16_dot_products_are_as_accurate_as_plain_pytorch(tmp_path: Path) -> None:
    bindings = ["bindings_module.cpp", "bindings_cpu_calls.cpp", "bindings_cpu_sparse_attention.cpp"]
    sources = [*bindings, *(f"cpu/{p.name}" for p in attention())]
    objects = [tmp_path / f"{name.replace('/', '-')}.o" for name in sources]
    flags = ["-O1", "-std=c++17", "-fPIC", "-fopenmp", "-Wno-psabi", "-DGDL_EMULATE_BF16_DOT"]
    if torch.backends.cpu.get_cpu_capability() == "AVX512":  # the registers of the CPUs that have the instruction
        flags += ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
    flags += ["-DGDL_MODULE=_cpu_emulated", "-Icsrc"]
    include = ["-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]
    compilers = [
        subprocess.Popen(["g++", *flags, *include, "-c", f"csrc/{name}", "-o", str(made)], cwd=ROOT)
        for name, made in zip(sources, objects)
    ]
    assert [compiler.wait() for compiler in compilers] == [0] * len(compilers)
    library = tmp_path / "_cpu_emulated.so"
    subprocess.run(["g++", "-shared", "-fopenmp", *map(str, objects), "-o", str(library)], check=True)
    checked = subprocess.run([sys.executable, "-c", CHECK, str(library)], cwd=ROOT, capture_output=True, text=True)
    assert "checked" in checked.stdout, checked.stdout + checked.stderr


def attention() -> list[Path]:
    return sorted((ROOT / "csrc/cpu").glob("sparse_attention*.cpp"))
