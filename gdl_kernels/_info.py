"""What is installed, built and usable on this machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from . import _backends, _native, _tuned

#: Every variable that changes what is built or what runs; docs/environment.md says how.
VARIABLES = (
    "GDL_KERNELS_BACKEND",
    "GDL_KERNELS_CUDA",
    "GDL_KERNELS_REQUIRE_NATIVE",
    "ATEN_CPU_CAPABILITY",
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDA_VISIBLE_DEVICES",
    "CXX",
    "MAX_JOBS",
    "OMP_NUM_THREADS",
    "TRITON_INTERPRET",
)


def collect() -> dict[str, Any]:
    """Everything that ``python -m gdl_kernels info`` shows, as JSON can hold it."""
    return {
        "versions": _versions(),
        "cpu": {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "module": _native.cpu_variant(),
            "threads": torch.get_num_threads(),
        },
        "gpus": [
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
            for properties in _gpus()
        ],
        "tuned": {
            f"sm_{capability}": _tuned_state(capability)
            for capability in sorted({10 * gpu.major + gpu.minor for gpu in _gpus()})
        },
        "native": {name: _native_state(name) for name in _native.MODULES},
        "build": _native.build_record(),
        "backends": _backends.available_backends(),
        "ops": {
            name: {backend: _op_state(choices, backend) for backend in _backends.BACKENDS}
            for name, choices in _backends.ops().items()
        },
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("gdl_kernels", "torch", "triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    versions["torch"] = torch.__version__
    versions["CUDA of torch"] = torch.version.cuda or "none: a CPU build"
    return versions


def _gpus() -> list[Any]:
    return [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]


def _tuned_state(capability: int) -> str:
    """Whether a table of measured launch configurations serves such a GPU."""
    try:
        table = _tuned.shipped(capability)
    except ValueError as error:
        return str(error)
    if table is None:
        return "no table: every Triton launcher chooses for itself (python -m benchmarks tune measures and writes one)"
    runs: dict[str, list[str]] = {}
    for op, about in table.about.items():
        run = f"on {about['gpu']}, {about['date'][:10]}, commit {str(about['commit'])[:9]}"
        runs.setdefault(run, []).append(f"{op} {sum(key[0] == op for key in table.rows)}")
    return "; ".join(f"rows: {', '.join(ops)}, {run}" for run, ops in runs.items())


def _native_state(name: str) -> str:
    if not _native.is_built(name):
        return f"not built: {_native.why_not_built(name)}"
    if name.startswith("_cpu") and name != _native.cpu_variant():
        # Not loaded even to look: its instructions may be more than this CPU has.
        return f"built; this CPU runs {_native.cpu_variant()}"
    return _native.load(name)[1] or "loaded"


def _op_state(choices: _backends.Choices, backend: str) -> str:
    if backend != "reference" and backend not in choices.reasons:
        return "no kernel"
    return "unavailable" if _native.missing(backend) else "available"
