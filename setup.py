"""The native build; the metadata is in pyproject.toml.

Each CPU module is the same sources under other flags, and the package picks one at import. Native code knows nothing of
torch, which is looked for only to learn whether it is a CUDA build. Where something can't be compiled the package
installs without it, and ``_build_info.json`` tells ``python -m gdl_kernels info`` why.
"""

from __future__ import annotations

import json
import os
import platform
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PACKAGE = "gdl_kernels"
RECORD = "_build_info.json"
OBJECTS = Path("build/native")
CUDA_ASKED = os.environ.get("GDL_KERNELS_CUDA", "")
BYTES_PER_JOB = 10**9
COMPLAINT_LENGTH = 4000  # the first errors are those that count

# Not -ffast-math: it drops infinities, on which attention's empty rows rest. The last three cost no such thing.
# gcc 12 takes its own AVX-512 headers to read uninitialised memory.
CXX_FLAGS = [
    "-O3", "-std=c++17", "-DNDEBUG", "-Wall", "-Wno-maybe-uninitialized", "-fPIC", "-fopenmp", "-fvisibility=hidden",
    "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
]  # fmt: skip
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
CPU_FLAGS = {
    "_cpu_avx512_bf16": [*AVX512, "-mavx512bf16"],
    "_cpu_avx512": AVX512,
    "_cpu_avx2": AVX2,
    "_cpu_default": [],
}

NVCC_FLAGS = ["-O3", "-std=c++17", "-DNDEBUG", "-lineinfo", "-Xcompiler", "-Wall,-fPIC,-fvisibility=hidden"]
#: Machine code to make for each architecture that nvcc knows: sm_80 runs on all of 8.x, and 90a has Hopper's own
#: instructions. Newer GPUs than these compile the last one's PTX when they first load it.
CUDA_TARGETS = {"compute_80": "80", "compute_90": "90a", "compute_100": "100"}


class Step(NamedTuple):
    """A command that makes one file of a module. A failed one fails its module."""

    module: str
    output: Path
    command: list[str]
    inputs: list[Path]


class LeftOut(Exception):
    """Why a module isn't built on this machine, as it should be."""


class CannotBuild(Exception):
    """Why a module that should be built can't be."""


def sources(*patterns: str) -> list[Path]:
    found = []
    for pattern in patterns:
        matches = sorted(Path("csrc").glob(pattern))
        if not matches:
            sys.exit(f"This source tree is incomplete: nothing matches csrc/{pattern}.")
        found += matches
    return found


def told(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def find_torch() -> Path | None:
    """The folder of the torch that the package will run with.

    pip's isolated build environment hides it from sys.path, but its interpreter still names the target's site-packages.
    """
    target = [*site.getsitepackages(), sysconfig.get_path("purelib"), site.getusersitepackages()]
    spec = find_spec("torch") or PathFinder.find_spec("torch", target)
    return Path(spec.origin).parent if spec and spec.origin else None


def find_cxx() -> list[str]:
    """The C++ compiler's command: CXX, or the first one on PATH."""
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [["g++"], ["c++"]]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    names = " or ".join(command[0] for command in candidates)
    raise CannotBuild(f"no C++ compiler: {names} is not on PATH (apt-get install g++, or set CXX)")


def find_cuda() -> Path | None:
    """The CUDA toolkit: the folder over bin/nvcc."""
    on_path = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if on_path:
        # A wrapper on PATH is in no toolkit; nvcc knows its own.
        dry_run = subprocess.run([on_path, "--dryrun", "-E", "any.cu"], capture_output=True, text=True).stderr
        homes += [line.partition("TOP=")[2] for line in dry_run.splitlines() if "TOP=" in line]
    homes += ["/usr/local/cuda", *sorted(map(str, Path("/usr/local").glob("cuda-*")), reverse=True)]
    return next((Path(home).resolve() for home in homes if home and Path(home, "bin", "nvcc").exists()), None)


def decide_cuda(torch: Path | None) -> Path:
    """The toolkit to build the CUDA kernels with."""
    if CUDA_ASKED == "0":
        raise LeftOut("GDL_KERNELS_CUDA=0 was set")
    if not CUDA_ASKED:
        version = runpy.run_path(str(torch / "version.py")) if torch else {"__version__": "(none found)"}
        if not version.get("cuda"):
            torch_name = f"torch {version['__version__']}"
            raise LeftOut(f"{torch_name} is not a CUDA build (GDL_KERNELS_CUDA=1 builds for CUDA all the same)")
    home = find_cuda()
    if home is None:
        why = "no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda* (install the CUDA toolkit)"
        raise CannotBuild(why) if CUDA_ASKED else LeftOut(why)
    return home


def find_pybind11(torch: Path | None) -> Path:
    try:
        import pybind11

        return Path(pybind11.get_include())
    except ImportError:
        if torch and (torch / "include/pybind11").is_dir():  # torch carries a copy: a machine without network has that
            return torch / "include"
        raise CannotBuild("pybind11 is not installed (pip install pybind11)") from None


def job_count() -> int:
    """MAX_JOBS, or as many as there are cores and memory for."""
    if "MAX_JOBS" in os.environ:
        return max(1, int(os.environ["MAX_JOBS"]))
    free = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        free += [1024 * int(line.split()[1]) for line in meminfo.read_text().splitlines() if "MemAvailable" in line]
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's own
    if limit.exists() and limit.read_text().strip().isdigit():
        free.append(int(limit.read_text()) - int(limit.with_name("memory.current").read_text()))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(size // BYTES_PER_JOB for size in free)]))


def cpu_steps(module: str, cxx: list[str], includes: list[str]) -> list[Step]:
    flags = [*CXX_FLAGS, *CPU_FLAGS[module], "-Icsrc"]
    steps = [compile_step(module, [*cxx, *flags], file) for file in sources("cpu/*.cpp")]
    for file in sources("bindings_module.cpp", "bindings_cpu_*.cpp"):
        steps.append(compile_step(module, [*cxx, *flags, f"-DGDL_MODULE={module}", *includes], file))
    return [*steps, link_step(module, [*cxx, "-shared", "-fopenmp"], steps, [])]


def cuda_steps(home: Path, cxx: list[str], includes: list[str]) -> list[Step]:
    nvcc = str(home / "bin/nvcc")
    targets = [name for name in CUDA_TARGETS if name in told(nvcc, "--list-gpu-arch").split()]
    gencode = [f"-gencode=arch=compute_{CUDA_TARGETS[name]},code=sm_{CUDA_TARGETS[name]}" for name in targets]
    gencode.append(f"-gencode=arch={targets[-1]},code={targets[-1]}")
    host = next(word for word in reversed(cxx) if not word.startswith("-"))  # CXX may be "ccache g++ -m64"
    device = [nvcc, "-ccbin", host, *NVCC_FLAGS, *gencode, "-Icsrc"]
    steps = [compile_step("_cuda", device, file) for file in sources("cuda/*.cu")]
    flags = [*CXX_FLAGS, "-DGDL_MODULE=_cuda", "-Icsrc", *includes, "-isystem", str(home / "include")]
    for file in sources("bindings_module.cpp", "bindings_cuda_*.cpp"):
        steps.append(compile_step("_cuda", [*cxx, *flags], file))
    # The static runtime leaves nothing to find at import; it shares torch's contexts and streams through the driver.
    folders = [f"-L{home / name}" for name in ("lib64", "lib", "targets/x86_64-linux/lib")]
    libraries = [*folders, "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return [*steps, link_step("_cuda", [*cxx, "-shared"], steps, libraries)]


def compile_step(module: str, compiler: list[str], source: Path) -> Step:
    output = OBJECTS / module / f"{source.relative_to('csrc')}.o".replace("/", "-")
    command = [*compiler, "-MD", "-MF", f"{output}.d", "-c", str(source), "-o", str(output)]
    return Step(module, output, command, [source])


def link_step(module: str, linker: list[str], steps: list[Step], libraries: list[str]) -> Step:
    output = OBJECTS / module / f"{module}.so"
    objects = [step.output for step in steps]
    return Step(module, output, [*linker, *map(str, objects), *libraries, "-o", str(output)], objects)


def up_to_date(step: Step) -> bool:
    """Whether the same command has made the output since any file that it reads was changed."""
    stamp, listed = Path(f"{step.output}.command"), Path(f"{step.output}.d")
    if not stamp.exists() or not step.output.exists() or stamp.read_text() != shlex.join(step.command):
        return False
    inputs = step.inputs
    if listed.exists():
        inputs = [Path(name) for name in shlex.split(listed.read_text().partition(":")[2]) if name.strip()]
    return all(path.exists() and path.stat().st_mtime < stamp.stat().st_mtime for path in inputs)


def run_step(step: Step) -> str:
    """Run a command that is not up to date; what it complained of if it failed."""
    if up_to_date(step):
        return ""
    stamp = Path(f"{step.output}.command")
    stamp.unlink(missing_ok=True)
    step.output.parent.mkdir(parents=True, exist_ok=True)
    started = time.time()
    print(f"{step.module}: {Path(step.command[0]).name} {step.output.name}", flush=True)
    outcome = subprocess.run(step.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if outcome.returncode:
        complaint = outcome.stdout.strip()[:COMPLAINT_LENGTH] or f"exit status {outcome.returncode}"
        return f"{shlex.join(step.command)}\n{complaint}"
    print(outcome.stdout, end="", flush=True)  # warnings
    stamp.write_text(shlex.join(step.command))
    os.utime(stamp, (started, started))  # a file saved while the compiler ran is newer than this
    return ""


def run_steps(steps: list[Step]) -> dict[str, str]:
    """Compile in parallel, then link; by module, why it failed."""
    failures: dict[str, str] = {}

    def attempt(step: Step) -> None:
        why = "" if step.module in failures else run_step(step)
        if why:
            failures.setdefault(step.module, why)

    with ThreadPoolExecutor(job_count()) as pool:
        for suffix in (".o", ".so"):
            list(pool.map(attempt, [step for step in steps if step.output.suffix == suffix]))
    return failures


def put(path: Path, content: bytes) -> None:
    """Write a file in one step: a library that a process has mapped must not change under it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    os.replace(partial, path)


class NativeBuild(build_ext):
    """Builds every module that this machine can build and records what became of each."""

    def run(self) -> None:
        steps: list[Step] = []
        left_out: dict[str, str] = {}
        failed: dict[str, str] = {}
        tools: dict[str, str] = {}
        modules = [extension.name.rpartition(".")[2] for extension in self.extensions]
        for module in modules:
            try:
                steps += self.steps(module, tools)
            except LeftOut as why:
                left_out[module] = str(why)
            except CannotBuild as why:
                failed[module] = str(why)
        failed |= run_steps(steps)
        built = [module for module in modules if module not in left_out and module not in failed]

        destinations = [Path(self.build_lib), *([Path()] if self.inplace else [])]
        for destination in destinations:
            (destination / PACKAGE).mkdir(parents=True, exist_ok=True)
            for extension, module in zip(self.extensions, modules):
                library = destination / self.get_ext_filename(extension.name)
                if module in built:
                    put(library, (OBJECTS / module / f"{module}.so").read_bytes())
                else:
                    library.unlink(missing_ok=True)  # an earlier build's, which must not outlive a failure
            record = {"tools": tools, "built": built, "left out": left_out, "failed": failed}
            put(destination / PACKAGE / RECORD, json.dumps(record, indent=1).encode())
        self.extensions = [extension for extension, module in zip(self.extensions, modules) if module in built]
        self.announce_outcome(built, left_out, failed)

    def steps(self, module: str, tools: dict[str, str]) -> list[Step]:
        if platform.system() != "Linux":
            raise LeftOut(f"native code is built on Linux only, and this is {platform.system()}")
        if CPU_FLAGS.get(module) and platform.machine() != "x86_64":
            raise LeftOut(f"it is for x86-64, and this machine is {platform.machine()}")
        torch = find_torch()
        home = decide_cuda(torch) if module == "_cuda" else None
        cxx = find_cxx()
        tools["c++"] = told(*cxx, "--version").splitlines()[0]
        includes = ["-isystem", sysconfig.get_path("include"), "-isystem", str(find_pybind11(torch))]
        if home is None:
            return cpu_steps(module, cxx, includes)
        tools["nvcc"] = told(str(home / "bin/nvcc"), "--version").splitlines()[-1]
        return cuda_steps(home, cxx, includes)

    def announce_outcome(self, built: list[str], left_out: dict[str, str], failed: dict[str, str]) -> None:
        for module in built:
            print(f"{module}: built")
        for module, why in left_out.items():
            print(f"{module}: not built: {why}")
        if not failed:
            return
        reasons = {why: [m for m in failed if failed[m] == why] for why in failed.values()}
        text = "\n\n".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())
        frame = "=" * 100
        fatal = os.environ.get("GDL_KERNELS_REQUIRE_NATIVE") == "1" or (CUDA_ASKED == "1" and "_cuda" in failed)
        outcome = (
            "The installation stops here, as GDL_KERNELS_REQUIRE_NATIVE=1 or GDL_KERNELS_CUDA=1 asked."
            if fatal
            else "gdl_kernels works without them, slower. `python -m gdl_kernels info` keeps saying so."
        )
        message = f"\n{frame}\nKERNELS COULD NOT BE COMPILED\n\n{text}\n\n{outcome}\n{frame}\n"
        if fatal:
            sys.exit(message)
        print(message, file=sys.stderr, flush=True)


def check_torch() -> None:
    """Stop before pip answers a missing torch with gigabytes of CUDA packages that the machine may have no use for."""
    if find_torch() is None and not CUDA_ASKED and not {"sdist", "egg_info"} & set(sys.argv):
        sys.exit(
            "gdl_kernels needs PyTorch, and this environment has none. Install the one that fits the machine first:\n"
            "    pip install torch==2.13.0                                                       # with an NVIDIA GPU\n"
            "    pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu      # without\n"
            "Or set GDL_KERNELS_CUDA=0 or =1, which says whether to build for CUDA, to go on without a look at PyTorch."
        )


if CUDA_ASKED not in ("", "0", "1"):
    sys.exit(f"GDL_KERNELS_CUDA must be 0, 1 or unset, got {CUDA_ASKED!r}.")
check_torch()
setup(
    ext_modules=[Extension(f"{PACKAGE}.{module}", sources=[]) for module in (*CPU_FLAGS, "_cuda")],
    cmdclass={"build_ext": NativeBuild},
)
