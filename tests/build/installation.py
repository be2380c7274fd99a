"""Copies of the project to install from, and environments to install into."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")


def copy_tree(target: Path) -> Path:
    """The project with the objects that are already compiled, which setup.py takes up only if nothing has changed."""
    target.mkdir()
    for name in FILES:
        shutil.copy2(ROOT / name, target)
    shutil.copytree(ROOT / "csrc", target / "csrc")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
    shutil.copytree(ROOT / "gdl_kernels", target / "gdl_kernels", ignore=ignore)
    if (ROOT / "build/native").is_dir():
        shutil.copytree(ROOT / "build/native", target / "build/native")
    return target


def copy_small_tree(target: Path) -> Path:
    """The project with one trivial kernel in place of all others, for what isn't about the kernels."""
    copy_tree(target)
    needed = {"bindings_cpu_calls.cpp", "huge_pages.h"}  # by every call, and so to import the package
    for pattern in ("bindings_c*.cpp", "cpu/*", "cuda/*"):
        for path in (target / "csrc").glob(pattern):
            if path.name not in needed:
                path.unlink()
    for folder in ("cpu", "cuda"):
        (target / "csrc" / folder).mkdir(exist_ok=True)
    (target / "csrc/cpu/one.h").write_text("int one();\n")
    (target / "csrc/cpu/one.cpp").write_text('#include "cpu/one.h"\nint one() { return 1; }\n')
    (target / "csrc/bindings_cpu_one.cpp").write_text('#include "cpu/one.h"\nint two() { return one() + one(); }\n')
    kernel = "__global__ void one(int* x) { *x = 1; }\nvoid run() { one<<<1, 1>>>(nullptr); }\n"
    (target / "csrc/cuda/one.cu").write_text(kernel)
    (target / "csrc/bindings_cuda_one.cpp").write_text("void run();\nvoid twice() { run(); run(); }\n")
    return target


def environment(**changes: str | None) -> dict[str, str]:
    """This process's environment without what would change an installation; None removes a variable."""
    ours = {"PYTHONPATH", "CXX", "GDL_KERNELS_CUDA", "GDL_KERNELS_REQUIRE_NATIVE", "GDL_KERNELS_BACKEND"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return {name: value for name, value in {**kept, **changes}.items() if value is not None}


def make_target(folder: Path) -> Path:
    """A fresh virtual environment that has torch and all else that this one has. Returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin/python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # Torch in its own right, for a build in isolation looks into this folder; all else by a path.
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    (site / "torch").symlink_to(Path(torch.origin).parent)
    (site / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
    return python


def run(*command: str | Path, fails: bool = False, cwd: Path | None = None, **variables: str | None) -> str:
    """What a command wrote; it must succeed, or fail if it is to."""
    # Not in the project's folder, whose gdl_kernels would be imported in place of the installed one.
    outcome = subprocess.run(
        list(map(str, command)), cwd=cwd or Path(command[0]).parent, env=environment(**variables),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert bool(outcome.returncode) == fails, f"exit status {outcome.returncode}\n{outcome.stdout}"
    return outcome.stdout


def pip_install(python: Path, *arguments: str | Path, fails: bool = False, **variables: str | None) -> str:
    """pip install into an environment that has no pip of its own. Verbose, for pip hides what a build says."""
    return run(sys.executable, "-m", "pip", "--python", python, "install", "-v", *arguments, fails=fails, **variables)
