"""Finds the compiled kernels: which variant this machine runs, and why one is missing."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

#: CPU variants by PyTorch's own name for the machine's capability, which reads CPUID and ATEN_CPU_CAPABILITY.
VARIANTS = {"AVX512": "_cpu_avx512", "AVX2": "_cpu_avx2", "DEFAULT": "_cpu_default"}

#: For CPUs that have bfloat16 dot products besides AVX-512.
BF16_VARIANT = "_cpu_avx512_bf16"

MODULES = (BF16_VARIANT, *VARIANTS.values(), "_cuda")

Loaded = tuple[ModuleType | None, str]


@functools.cache
def build_record() -> dict[str, Any]:
    """What setup.py wrote: ``tools``, ``built``, ``left out`` and ``failed``; empty if it never ran here."""
    path = Path(__file__).with_name("_build_info.json")
    return json.loads(path.read_text()) if path.exists() else {}


def is_built(name: str) -> bool:
    return importlib.util.find_spec(f"gdl_kernels.{name}") is not None


def why_not_built(name: str) -> str:
    """Why a module is not there, in one line."""
    record = build_record()
    if name in record.get("failed", {}):
        lines = record["failed"][name].splitlines()
        return "it could not be compiled: " + next((line for line in lines if "error" in line), lines[0]).strip()
    if name in record.get("left out", {}):
        return record["left out"][name]
    return f"nothing was built in {Path(__file__).parent} (pip install -e . --no-build-isolation)"


def load(name: str) -> Loaded:
    """One native module, or None and the reason."""
    if not is_built(name):
        return None, f"gdl_kernels.{name} is not built: {why_not_built(name)}"
    try:
        return importlib.import_module(f"gdl_kernels.{name}"), ""
    except ImportError as error:
        return None, f"gdl_kernels.{name} does not load: {error}"


def cpu_variant() -> str:
    """The name of the CPU module that this machine runs."""
    best = VARIANTS.get(torch.backends.cpu.get_cpu_capability(), "_cpu_default")
    ladder = [BF16_VARIANT, *VARIANTS.values()]
    if best != "_cpu_avx512" or not torch.cpu._is_avx512_bf16_supported():
        ladder = ladder[ladder.index(best) :]
    # Where the best could not be compiled the next best serves; where none was, the best is what is missing.
    return next(filter(is_built, ladder), ladder[0])


@functools.cache
def cpu() -> Loaded:
    """The C++ kernels for this CPU, or None and the reason."""
    return load(cpu_variant())


@functools.cache
def cuda() -> Loaded:
    """The CUDA C++ kernels, or None and the reason."""
    return load("_cuda")


@functools.cache
def triton() -> str:
    """Why Triton kernels can't run here; empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'gdl_kernels[triton]')"
    if not torch.cuda.is_available() and not interpreting():
        return "no CUDA GPU is visible, and TRITON_INTERPRET=1 is not set"
    return ""


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def missing(backend: str) -> list[str]:
    """Why a backend is missing from this machine; empty if it is there."""
    reason = _missing(backend)
    return [reason] if reason else []


# What is installed does not change while a process lives, so torch.compile need not look.
@torch.compiler.assume_constant_result
def _missing(backend: str) -> str:
    if backend == "cpu":
        return cpu()[1]
    if backend == "cuda":
        return cuda()[1] or ("" if torch.cuda.is_available() else "no CUDA GPU is visible")
    if backend == "triton":
        return triton()
    return ""


def cpu_module() -> ModuleType:
    module, reason = cpu()
    if module is None:
        raise RuntimeError(reason)
    return module


def cuda_module() -> ModuleType:
    module, reason = cuda()
    if module is None:
        raise RuntimeError(reason)
    return module
