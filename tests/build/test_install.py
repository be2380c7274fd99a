"""Real installations by pip into throw-away environments."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tarfile
import urllib.request
from pathlib import Path

import pytest
import setuptools
from installation import copy_small_tree, copy_tree, make_target, pip_install, run

CPU_MODULES = ("_cpu_avx512_bf16", "_cpu_avx512", "_cpu_avx2", "_cpu_default")

#: What a user would do first, on whatever backend auto picks. Prints the warnings, and the error against float64.
FIRST_CALL = """
import warnings, torch, gdl_kernels as gdl
query, key, value = torch.randn(3, 1, 2, 96, 32).unbind()
layout = gdl.layouts.from_mask(torch.rand(96, 96) < 0.5)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    out = [gdl.sparse_attention(query, key, value, layout) for _ in range(2)]
exact = gdl.sparse_attention(query.double(), key.double(), value.double(), layout, backend="reference")
assert all((o - exact).abs().max() < 1e-5 for o in out)
print(*(str(w.message) for w in caught), sep="\\n")
"""


def info(python: Path) -> dict[str, dict[str, str]]:
    return json.loads(run(python, "-m", "gdl_kernels", "info", "--json"))


def installed_files(python: Path) -> list[str]:
    listing = "import importlib.metadata as m; print(*(str(f) for f in m.files('gdl_kernels')), sep='\\n')"
    return run(python, "-c", listing).split()


@pytest.fixture(scope="module")
def small_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One trivial kernel, compiled once. Copy it before changing it."""
    tree = copy_small_tree(tmp_path_factory.mktemp("small") / "tree")
    run(sys.executable, "setup.py", "build_ext", cwd=tree, GDL_KERNELS_REQUIRE_NATIVE="1")
    return tree


def copy_of(tree: Path, target: Path) -> Path:
    subprocess.run(["cp", "-a", tree, target], check=True)
    return target


def test_without_build_isolation(tmp_path: Path) -> None:
    tree, python = copy_tree(tmp_path / "tree"), make_target(tmp_path / "target")
    pip_install(python, "--no-index", "--no-build-isolation", tree)
    facts = info(python)
    assert facts["native"][facts["cpu"]["module"]] == "loaded"
    assert all(facts["native"][name].startswith(("loaded", "built")) for name in CPU_MODULES)
    assert "_cuda" in facts["build"]["left out"] or "_cuda" in facts["build"]["built"]
    assert run(python, "-c", FIRST_CALL).strip() == ""

    files = installed_files(python)
    assert not [name for name in files if name.endswith((".cpp", ".cu", ".h", ".cuh"))]
    assert "gdl_kernels/py.typed" in files
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in files)
    assert {name.split("/")[0] for name in files if ".dist-info" not in name} == {"gdl_kernels"}


def test_in_isolation_from_an_sdist(small_tree: Path, tmp_path: Path) -> None:
    try:
        urllib.request.urlopen("https://pypi.org/simple/pybind11/", timeout=20).close()
    except OSError as error:
        pytest.skip(f"pip's isolated build needs pypi.org, which can't be reached: {error}")
    tree, python = copy_of(small_tree, tmp_path / "tree"), make_target(tmp_path / "target")
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path / "sdist", cwd=tree)
    (sdist,) = (tmp_path / "sdist").iterdir()
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {str(path.relative_to(tree)) for path in (tree / "csrc").rglob("*") if path.is_file()} <= packed
    assert not [name for name in packed if name.startswith("build/") or name.endswith((".so", "_build_info.json"))]
    pip_install(python, "--no-deps", sdist)
    facts = info(python)
    assert facts["native"][facts["cpu"]["module"]] == "loaded"


def test_editable(small_tree: Path, tmp_path: Path) -> None:
    tree, python = copy_of(small_tree, tmp_path / "tree"), make_target(tmp_path / "target")
    pip_install(python, "--no-index", "--no-build-isolation", "-e", tree)
    assert run(python, "-c", "import gdl_kernels; print(gdl_kernels.__file__)").strip().startswith(str(tree))
    facts = info(python)
    assert facts["native"][facts["cpu"]["module"]] == "loaded"


def test_no_compiler(small_tree: Path, tmp_path: Path) -> None:
    tree, python = copy_of(small_tree, tmp_path / "tree"), make_target(tmp_path / "target")
    # The compiled libraries that lie in build/lib would end in the wheel if nobody took them out.
    assert list((tree / "build").glob("lib*/gdl_kernels/_cpu_default*.so"))
    told = pip_install(python, "--no-index", "--no-build-isolation", tree, PATH=str(python.parent))
    assert "KERNELS COULD NOT BE COMPILED" in told
    assert "no C++ compiler: g++ or c++ is not on PATH" in told

    facts = info(python)
    assert all("no C++ compiler" in facts["native"][name] for name in CPU_MODULES)
    assert "no C++ compiler" in facts["backends"]["cpu"]
    assert "no C++ compiler" in run(python, "-m", "gdl_kernels", "info")
    assert not [name for name in installed_files(python) if name.endswith(".so")]
    (warning,) = run(python, "-c", FIRST_CALL).strip().splitlines()
    assert "sparse_attention runs on the slower backend 'reference'" in warning
    assert "no C++ compiler" in warning
    assert "no C++ compiler" in run(python, "-m", "gdl_kernels", "verify")


def test_compile_error(small_tree: Path, tmp_path: Path) -> None:
    tree, python = copy_of(small_tree, tmp_path / "tree"), make_target(tmp_path / "target")
    (tree / "csrc/cpu/one.cpp").write_text("int one() { return undeclared_name; }\n")
    told = pip_install(python, "--no-index", "--no-build-isolation", tree)
    assert "KERNELS COULD NOT BE COMPILED" in told
    assert "undeclared_name" in told
    assert "could not be compiled: csrc/cpu/one.cpp:1:" in info(python)["native"]["_cpu_default"]
    assert "undeclared_name" in run(python, "-m", "gdl_kernels", "info")
    (warning,) = run(python, "-c", FIRST_CALL).strip().splitlines()
    assert "undeclared_name" in warning


def test_require_native_makes_it_an_error(small_tree: Path, tmp_path: Path) -> None:
    tree = copy_of(small_tree, tmp_path / "tree")
    told = run(
        sys.executable, "setup.py", "bdist_wheel", "--dist-dir", tmp_path / "dist", cwd=tree,
        CXX="no-such-compiler", GDL_KERNELS_REQUIRE_NATIVE="1", fails=True,
    )  # fmt: skip
    assert "no-such-compiler is not on PATH" in told
    assert not (tmp_path / "dist").exists()


def test_no_torch(small_tree: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    python, tools = tmp_path / "bare/bin/python", tmp_path / "tools"
    tools.mkdir()
    for name in ("setuptools", "_distutils_hack", "pybind11"):
        (tools / name).symlink_to(Path(importlib.import_module(name).__file__).parent)
    for dist_info in Path(setuptools.__file__).parents[1].glob("setuptools-*.dist-info"):
        (tools / dist_info.name).symlink_to(dist_info)
    metadata = (python, "setup.py", "dist_info", "--output-dir", tmp_path)
    variables = {"PYTHONPATH": str(tools), "PYTHONNOUSERSITE": "1"}
    told = run(*metadata, cwd=small_tree, fails=True, **variables)
    assert "pip install torch==" in told
    assert "Traceback" not in told
    run(*metadata, cwd=small_tree, GDL_KERNELS_CUDA="0", **variables)
    assert list(tmp_path.glob("*.dist-info"))


def test_unknown_setting_is_refused(small_tree: Path) -> None:
    told = run(sys.executable, "setup.py", "build_ext", cwd=small_tree, GDL_KERNELS_CUDA="yes", fails=True)
    assert "GDL_KERNELS_CUDA must be 0, 1 or unset, got 'yes'" in told


def test_only_what_changed_is_compiled_again(small_tree: Path, tmp_path: Path) -> None:
    tree = copy_of(small_tree, tmp_path / "tree")
    assert "g++" not in run(sys.executable, "setup.py", "build_ext", cwd=tree)
    (tree / "csrc/cpu/one.h").touch()
    told = run(sys.executable, "setup.py", "build_ext", cwd=tree)
    for module in CPU_MODULES:
        for output in ("cpu-one.cpp.o", "bindings_cpu_one.cpp.o", f"{module}.so"):
            assert f"{module}: g++ {output}" in told
    assert "bindings_module.cpp.o" not in told
