"""Every CUDA source compiles for every GPU, on any machine with nvcc, and keeps its registers out of memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
ARCHITECTURES = ["80", "90a", "100"]


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [shutil.which("nvcc"), *(shutil.which("nvcc", path=f"{home}/bin") for home in homes if home)]
    return next((nvcc for nvcc in candidates if nvcc), None)


NVCC = find_nvcc()
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not in CUDA_HOME, on PATH or in /usr/local/cuda")


def compile_report(source: Path, architecture: str, folder: Path) -> str:
    """What nvcc and ptxas say of a source."""
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    output = folder / f"{source.stem}.{architecture}.o"
    command = [NVCC, "-O3", "-std=c++17", "-I", CSRC, "-gencode", target, "-Xptxas", "-v", "-c", source, "-o", output]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, f"{source.name} for sm_{architecture}:\n{done.stdout}{done.stderr}"
    return done.stderr


def in_memory(report: str) -> list[str]:
    """The kernels of a report that have a stack frame or spill, each with ptxas's line."""
    found, kernel = [], ""
    for line in report.splitlines():
        if entry := re.search(r"(?:Function properties for|Compiling entry function) '?(\w+)", line):
            kernel = entry[1]
        used = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if used and any(map(int, used.groups())):
            found.append(f"{kernel}: {line.strip()}")
    return found


def test_no_kernel_uses_local_memory(tmp_path: Path) -> None:
    assert SOURCES
    jobs = [(source, architecture) for source in SOURCES for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = list(pool.map(lambda job: compile_report(*job, tmp_path), jobs))
    found = []
    for (source, architecture), report in zip(jobs, reports):
        # Without these lines the check below would see nothing, and pass.
        assert "bytes stack frame" in report, f"{source.name} for sm_{architecture}: ptxas reports no kernel\n{report}"
        found += [f"{source.name}, sm_{architecture}: {line}" for line in in_memory(report)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        # An index that is known only at run time: the array has to have an address.
        (
            "stack",
            "float a[64];\nfor (int i = 0; i < 64; ++i) a[i] = x[i];\n"
            "for (int i = 0; i < 64; ++i) x[i] = a[int(x[i + 64]) & 63];",
        ),
        # 200 values alive at once, in a block of 1024 threads, which leaves 64 registers to each.
        (
            "spill",
            "float a[200];\n#pragma unroll\nfor (int i = 0; i < 200; ++i) a[i] = x[i * 1024 + threadIdx.x];\n"
            "__syncthreads();\n#pragma unroll\nfor (int i = 0; i < 200; ++i) x[i * 7 + threadIdx.x] = a[199 - i];",
        ),
    ],
    ids=["stack", "spill"],
)
def test_local_memory_is_seen(name: str, body: str, tmp_path: Path) -> None:
    source = tmp_path / f"{name}.cu"
    source.write_text(f"__global__ void __launch_bounds__(1024) bad_{name}(float* x) {{ {body} }}\n")
    (line,) = in_memory(compile_report(source, "90a", tmp_path))
    assert f"bad_{name}" in line


def test_a_clean_kernel_is_not_flagged(tmp_path: Path) -> None:
    source = tmp_path / "clean.cu"
    source.write_text("__global__ void clean(float* x) { x[threadIdx.x] *= 2; }\n")
    report = compile_report(source, "90a", tmp_path)
    assert "clean" in report
    assert not in_memory(report)
