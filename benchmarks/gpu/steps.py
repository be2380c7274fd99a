"""What ``make gpu`` runs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import reports

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable

#: Processes at a time, where most of the work is compiling. Each holds some gigabytes.
JOBS = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)

#: The GANs of their papers and, for its width, a tenth of MuseNet's layers: plain PyTorch has to hold its scores too.
PUBLISHED = {
    "musenet": "--layers 7 --heads 24 --width 1536",
    "progan": "--size 1024 --latent 512 --capacity 16384 --widest 512 --batch 4",
    "sagan": "--size 128 --width 64 --attention-at 32 --batch 16",
    "biggan": "--size 128 --width 96 --latent 120 --attention-at 64 --batch 16",
    "stylegan": "--size 1024 --latent 512 --style 512 --mapping-layers 8 --capacity 16384 --widest 512 --batch 4",
}

#: The ops that are measured in one process, and their share of the time. In a process of its own each would first wait
#: for compilers to start; after one that brings the GPU down, those of its own process are lost and no others.
GROUPS = {
    "attention": (90, ("sparse_attention", "minibatch_self_attention", "positional_embedding")),
    "images": (60, ("adain", "style_epilogue", "conditional_batch_norm", "minibatch_stddev", "pixel_norm")),
    "weights": (40, ("spectral_normalize", "orthogonal_regularization", "orthogonalize")),
}

#: Where there are tests marked ``gpu``. Those of models import more than every machine has.
TESTS = ("tests/ops", "tests/nn", "tests/test_triton.py", "tests/benchmarks/test_runner.py")

#: The ops whose Triton kernels are tuned in the long form, each in a process of its own, and their share of the time:
#: by how many kernels they have at how many keys, and how long those take to compile.
TUNED = {
    "sparse_attention": 800,
    "minibatch_self_attention": 250,
    "conditional_batch_norm": 350,
    "minibatch_stddev": 150,
    "positional_embedding": 80,
    "spectral_normalize": 100,
    "orthogonal_regularization": 100,
}

#: The models, which the long form measures as well, and what their data comes from.
DATA = {
    "musenet": ("music21",),
    "transformer": ("music21",),
    "bert": (),
    "gpt2": (),
    "progan": ("sklearn",),
    "sagan": ("sklearn",),
    "biggan": ("sklearn",),
    "stylegan": ("sklearn",),
}

#: No step is begun with fewer seconds: torch alone takes some to start.
LEAST = 15.0

#: For steps of several processes, or as many threads as cores in each would wait for one another.
ALONE = {"OMP_NUM_THREADS": "1"}

#: Modules that each part of the project imports besides torch.
COMMANDS = ("typer", "rich")
MODELS = (*COMMANDS, "safetensors", "PIL")


@dataclass(frozen=True)
class Step:
    """A command, and what has to be known to run it and to tell how it ended.

    Attributes:
        share: of the time that is left, as against the shares of those that follow; in the quick form, about seconds.
        report: a few words on what it found, from its log.
        writes: the file that has what it found.
        needs: modules that it imports and a machine may lack.
        missing: another reason why it can't be run.
        refused: printed by a command that can't work on this machine: it was then not run.
        takes_minutes: whether the command is told how long it has, by ``--minutes``.
        least: seconds that it may take whatever its share, if they are left.
        environment: variables that are set for it.
    """

    name: str
    command: Sequence[str]
    share: float
    report: Callable[[Path], str] = reports.last_line
    writes: Path | None = None
    needs: Sequence[str] = ()
    missing: str = ""
    refused: str = ""
    takes_minutes: bool = False
    least: float = LEAST
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def cannot(self) -> str:
        """Why it can't be run here; empty if it can."""
        lacking = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"needs {', '.join(lacking)}" if lacking else self.missing


def steps(results: Path, *, long: bool) -> list[Step]:
    """All steps, the most important first. What they write goes to ``results``."""
    build = [PYTHON, "setup.py", "--quiet", "build_ext", "--inplace"]
    checks = [
        Step("build", build, 150, needs=("setuptools",), least=120),
        Step("info", [PYTHON, "-m", "gdl_kernels", "info"], 10, lambda log: "", needs=COMMANDS),
        verification("verify", 80),
        tests(results / "tests.xml"),
        sanitizer("memcheck", 50, ("float32", "bfloat16")),
    ]
    tuning = [*(tuner(op, share) for op, share in TUNED.items()), verification("verify, tuned", 80)]
    others = [
        sanitizer("racecheck", 25, ("bfloat16",)),
        # Uninitialised memory can't be seen in what poison has filled.
        sanitizer("initcheck", 20, ("bfloat16",), "--no-poison"),
        *comparisons(results),
    ]
    return [*checks, *(tuning if long else []), *benchmarks(results, long=long), *others]


def verification(name: str, share: float) -> Step:
    command = [PYTHON, "-m", "gdl_kernels", "verify", "--jobs", str(JOBS)]
    return Step(name, command, share, reports.verified, needs=COMMANDS, least=60, environment=ALONE)


def tuner(op: str, share: float) -> Step:
    command = [PYTHON, "-m", "benchmarks", "tune", "--op", op]
    return Step(f"tune {op}", command, share, needs=(*COMMANDS, "triton"), takes_minutes=True)


def tests(report: Path) -> Step:
    command = [PYTHON, "-m", "pytest", "-q", "-m", "gpu", *TESTS, f"--junitxml={report}"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(JOBS), "--dist", "loadgroup"]
    needs = ("pytest", "hypothesis", *COMMANDS)
    return Step(
        "tests", command, 180, lambda log: reports.tested(report), report, needs, least=170, environment=ALONE
    )  # fmt: skip


def sanitizer(tool: str, share: float, dtypes: Sequence[str], *options: str) -> Step:
    """The GPU's kernels on a small set under compute-sanitizer, which takes 10 to 100 times as long."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    watched = ["--tool", tool, "--target-processes", "all", "--launch-timeout", "0", "--error-exitcode", "1"]
    # Libraries ask the driver for what it may not have: such a call is no error of ours.
    watched += ["--report-api-errors", "no"]
    verify = [PYTHON, "-m", "gdl_kernels", "verify", "--backend", "cuda", "--backend", "triton", "--jobs", str(JOBS)]
    verify += [word for dtype in dtypes for word in ("--dtype", dtype)]
    return Step(
        tool,
        [program or "compute-sanitizer", *watched, *verify, *options],
        share,
        reports.sanitized,
        needs=COMMANDS,
        missing="" if program else "compute-sanitizer is not on PATH",
        refused="Device not supported",
        # An overrun shows only where PyTorch doesn't hand out pieces of one large allocation.
        environment={**ALONE, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )


def benchmarks(results: Path, *, long: bool) -> list[Step]:
    """A few cases of each op, or, in the long form, all of each op and model."""
    found = [
        _benchmark(group, [word for op in ops for word in ("--op", op)], results / f"{group}.json", share, long)
        for group, (share, ops) in GROUPS.items()
    ]
    if long:
        found += [
            _benchmark(model, ["--model", model], results / f"{model}.json", 12, long, (*MODELS, *data))
            for model, data in DATA.items()
        ]
    return found


def _benchmark(
    name: str, what: list[str], run: Path, share: float, long: bool, needs: Sequence[str] = COMMANDS
) -> Step:
    command = [PYTHON, "-m", "benchmarks", *what, "--device", "cuda", *([] if long else ["--quick"])]
    return Step(
        f"benchmark {name}",
        [*command, "--json", str(run)],
        10 * share if long else share,
        lambda log: reports.measured(run),
        writes=run,
        needs=needs,
        takes_minutes=True,
    )


def comparisons(results: Path) -> list[Step]:
    """Models at their published sizes, on our kernels and in plain PyTorch."""
    return [_comparison(model, shape, results / f"compare_{model}.json") for model, shape in PUBLISHED.items()]


def _comparison(model: str, shape: str, found: Path) -> Step:
    return Step(
        f"compare {model}",
        [PYTHON, "-m", "models", "compare", model, *shape.split(), "--device", "cuda", "--json", str(found)],
        6,
        lambda log: reports.compared(found),
        writes=found,
        least=30,
        needs=(*MODELS, *DATA[model]),
    )
