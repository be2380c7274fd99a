"""Everything that needs a GPU, in one go: ``make gpu``.

Builds for CUDA in place, then tests, checks and measures. A step that fails is told at the end and doesn't stop the
others. Runs in whatever Python it is started with, and installs nothing.

    python -m benchmarks.gpu
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

from models.checkout import commit

from .machine import versions

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable


#: The GANs of their papers and, for its width, a tenth of MuseNet's layers: plain PyTorch has to hold its scores too.
PUBLISHED = {
    "musenet": "--layers 7 --heads 24 --width 1536",
    "progan": "--size 1024 --latent 512 --capacity 16384 --widest 512 --batch 4",
    "sagan": "--size 128 --width 64 --attention-at 32 --batch 16",
    "biggan": "--size 128 --width 96 --latent 120 --attention-at 64 --batch 16",
    "stylegan": "--size 1024 --latent 512 --style 512 --mapping-layers 8 --capacity 16384 --widest 512 --batch 4",
}


def steps(results: Path) -> dict[str, list[str]]:
    """Each step's command. Without compute-sanitizer its steps have none."""
    verify = [PYTHON, "-m", "gdl_kernels", "verify"]
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    commands = {
        "build": [PYTHON, "setup.py", "--quiet", "build_ext", "--inplace"],
        "info": [PYTHON, "-m", "gdl_kernels", "info"],
        "tests": [PYTHON, "-m", "pytest", "-q", "-m", "gpu", "tests/ops"],  # others import what a GPU machine may lack
        "verify": verify,
    }
    for tool in ("memcheck", "racecheck"):
        run = [sanitizer, "--tool", tool, "--error-exitcode", "1", *verify] if sanitizer else []
        commands[f"compute-sanitizer {tool}"] = run
    record = results / "benchmarks.json"
    # Quick: a GPU that is lent is lent for minutes. The full run is the same command without it.
    commands["benchmarks"] = [PYTHON, "-m", "benchmarks", "--device", "cuda", "--quick", "--json", str(record)]
    for model, shape in PUBLISHED.items():
        figures = ["--device", "cuda", "--json", str(results / f"compare_{model}.json")]
        commands[f"compare {model}"] = [PYTHON, "-m", "models", "compare", model, *shape.split(), *figures]
    return commands


def main() -> int:
    if not torch.cuda.is_available():
        print(f"make gpu needs a CUDA GPU, and torch {torch.__version__} in {PYTHON} sees none.", file=sys.stderr)
        return 1
    gpu = torch.cuda.get_device_name()
    results = ROOT / "benchmarks" / "results" / re.sub(r"\W+", "-", gpu).strip("-").lower()
    results.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "GDL_KERNELS_CUDA": "1",
        "GDL_KERNELS_REQUIRE_NATIVE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    outcomes = {}
    for name, command in steps(results).items():
        if not command:
            outcomes[name] = "not run: compute-sanitizer is not on PATH"
            continue
        print(f"\n== {name}: {' '.join(command)}", flush=True)
        # The sanitizer sees an overrun only where PyTorch doesn't hand out pieces of one large allocation.
        extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if "sanitizer" in name else {}
        started = time.monotonic()
        status = subprocess.run(command, cwd=ROOT, env={**environment, **extra}).returncode
        verdict = "passed" if status == 0 else f"FAILED, exit status {status}"
        outcomes[name] = f"{verdict}, {time.monotonic() - started:.0f} s"
    print(f"\n{gpu}, torch {torch.__version__}")
    width = max(map(len, outcomes))
    for name, outcome in outcomes.items():
        print(f"  {name:{width}}  {outcome}")
    write_record(results / "checks.json", gpu, outcomes)
    return any("FAILED" in outcome for outcome in outcomes.values())


def write_record(path: Path, gpu: str, outcomes: dict[str, str]) -> None:
    """What docs/verified.md cites: which commit was checked where and when."""
    record = {
        "gpu": gpu,
        "versions": versions(),
        **commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "steps": outcomes,
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, path)


if __name__ == "__main__":
    sys.exit(main())
