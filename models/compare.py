"""One model twice, on our kernels and in plain PyTorch: do they agree, how fast is each, how much memory does it take?

Each side runs in a fresh process of its own, so that neither's memory is counted for the other; both stay alive, and
take turns at being timed, so that a change in the machine's speed meets both. Before that each warms up until it has as
much memory as it keeps.
"""

from __future__ import annotations

import multiprocessing
import platform
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gdl_kernels
from gdl_kernels import _native
from gdl_kernels._backends import Explanation

from .memory import keep_freed_memory

#: Allowed ``|ours - reference| / |reference|``, in 2-norms, of the output and of each parameter's gradient.
TOLERANCES = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (1e-5, 1e-4),
    torch.bfloat16: (3e-2, 1e-1),
    torch.float16: (5e-3, 2e-2),
}

#: Of models with ReLUs, max-pooling or hinges. Where rounding takes one value over a kink, the gradient differs by as
#: much as that value has a part in it, which is far more than rounding; in float64 it does not happen.
TOLERANCES_WITH_KINKS = TOLERANCES | {
    torch.float32: (1e-5, 1e-2),
    torch.bfloat16: (3e-2, 3e-1),
    torch.float16: (5e-3, 1e-1),
}

#: Decoding only where the problem has it; and before training, which changes the weights.
PHASES = ("forward", "decoding", "training step")
SIDES = ("kernels", "reference")

#: Runs of each phase that a process warms up for: the second of a StyleGAN's steps takes 15 % longer than later ones.
SETTLING = 2


@dataclass(frozen=True)
class Problem:
    """A model with its input.

    Attributes:
        forward: the output; called without gradients.
        loss: what a training step differentiates.
        explain: for each of our ops that the model calls, who serves it.
        decode: the output of decoding a few tokens one by one, those before them being in a cache; called in inference
            mode.
    """

    model: nn.Module
    forward: Callable[[], Tensor]
    loss: Callable[[], Tensor]
    explain: Callable[[], list[Explanation]]
    decode: Callable[[], Tensor] | None = None

    @property
    def phases(self) -> tuple[str, ...]:
        return tuple(phase for phase in PHASES if phase != "decoding" or self.decode is not None)


class SideFailed(RuntimeError):
    """A side could not be run; the message says which, and why."""


#: Builds a problem, always with the same weights and input. Pickled: a function of a module, or a ``partial`` of one.
Build = Callable[[], Problem]


@dataclass(frozen=True)
class Measurement:
    """Medians in seconds, and the peak of memory beyond model and input in bytes; None where the system tells none."""

    seconds: float
    spread: float
    peak: int | None


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found."""

    dtype: torch.dtype
    device: str
    parameters: int
    repetitions: int
    served: dict[str, dict[str, str]]  # op -> backend -> verdict
    output_error: float
    loss: dict[str, float]  # side -> loss
    gradient_error: float
    worst_parameter: str
    measured: dict[str, dict[str, Measurement]]  # phase -> side
    decoding_error: float | None = None  # None where nothing is decoded
    kinks: bool = False

    @property
    def tolerances(self) -> tuple[float, float]:
        """What errors of the output and of gradients are allowed."""
        return (TOLERANCES_WITH_KINKS if self.kinks else TOLERANCES)[self.dtype]

    @property
    def agree(self) -> bool:
        output, gradient = self.tolerances
        decoding = 0.0 if self.decoding_error is None else self.decoding_error
        return self.output_error <= output and decoding <= output and self.gradient_error <= gradient  # False for NaN

    @property
    def chosen(self) -> dict[str, str]:
        """Op to the backend that served it."""
        return {op: next(b for b, verdict in verdicts.items() if verdict == "chosen")
                for op, verdicts in self.served.items()}  # fmt: skip

    @property
    def on_kernels(self) -> bool:
        """Whether a kernel of ours served every op: where not, there is no speed to speak of."""
        return "reference" not in self.chosen.values()

    def speedup(self, phase: str) -> float | None:
        sides = self.measured[phase]
        return sides["reference"].seconds / sides["kernels"].seconds if self.agree and self.on_kernels else None

    def as_json(self) -> dict[str, Any]:
        output, gradient = self.tolerances
        return {
            "agree": self.agree, "device": self.device, "dtype": str(self.dtype).removeprefix("torch."),
            "parameters": self.parameters, "repetitions": self.repetitions, "backends": self.served,
            "output_error": self.output_error, "decoding_error": self.decoding_error, "output_tolerance": output,
            "gradient_error": self.gradient_error, "gradient_tolerance": gradient,
            "worst_parameter": self.worst_parameter, "loss": self.loss,
            "phases": {
                phase: {side: vars(m) for side, m in sides.items()} | {"speedup": self.speedup(phase)}
                for phase, sides in self.measured.items()
            },
            "machine": {
                "processor": processor(self.device), "threads": torch.get_num_threads(),
                "torch": torch.__version__, "python": platform.python_version(),
            },
        }  # fmt: skip


def compare(
    build: Build,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    backend: str = "auto",
    repetitions: int = 3,
    kinks: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Run a problem on our kernels and on the reference.

    Args:
        dtype, device: what ``build`` builds in and on.
        backend: what serves our side.
        repetitions: timed runs of each phase on each side, after three that are not timed.
        kinks: whether the gradient jumps, as with ReLUs: see ``TOLERANCES_WITH_KINKS``.
        say: is told what happens.

    Raises:
        ValueError: if ``dtype`` has no tolerance, ``repetitions`` is not positive, or ``backend`` is none or not here.
        SideFailed: if a side can't be run, as when ``backend`` can't serve it; the message has the reason.
    """
    if dtype not in TOLERANCES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, TOLERANCES))}, got {dtype}")
    if repetitions < 1:
        raise ValueError(f"repetitions must be at least 1, got {repetitions}")
    check_backend(backend)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sides = {}
        for side, served_by in zip(SIDES, (backend, "reference")):
            sides[side] = stack.enter_context(_Side.started(side, build, served_by, device, folder))
        about = {side: process.ask("about") for side, process in sides.items()}
        peaks: dict[tuple[str, str], int | None] = {}
        parameters, served, phases = about["kernels"]
        times: dict[tuple[str, str], list[float]] = {(p, s): [] for p in phases for s in SIDES}
        for phase in phases:
            for side, process in sides.items():
                say(f"{phase}, {side}: the first run")
                peaks[phase, side] = process.ask(phase, True)[1]
        losses = {side: process.ask("save") for side, process in sides.items()}
        say("comparing outputs and gradients")
        ours, reference = (load_file(folder / f"{side}.safetensors") for side in SIDES)
        decoding_error = relative_error(ours.pop("decoded"), reference.pop("decoded")) if "decoding" in phases else None
        output_error, gradient_error, worst = errors(ours, reference)
        for _ in range(SETTLING):
            for phase in phases:
                for side, process in sides.items():
                    say(f"{phase}, {side}: warming up")
                    process.ask(phase, False)
        for repetition in range(repetitions):
            for phase in phases:
                order = SIDES if repetition % 2 == 0 else SIDES[::-1]
                for side in order:
                    say(f"{phase}, {side}: timed run {repetition + 1} of {repetitions}")
                    times[phase, side].append(sides[side].ask(phase, False)[0])
    measured = {
        phase: {
            side: Measurement(
                statistics.median(times[phase, side]),
                max(times[phase, side]) - min(times[phase, side]),
                peaks[phase, side],
            )
            for side in SIDES
        }
        for phase in phases
    }
    return Comparison(
        dtype, device, parameters, repetitions, served, output_error, losses, gradient_error, worst, measured,
        decoding_error, kinks,
    )  # fmt: skip


def check_backend(backend: str) -> None:
    """Raise a ValueError if there is no such backend, or this machine lacks it."""
    with gdl_kernels.backend(backend):  # which refuses a wrong name
        if reasons := _native.missing(backend):
            raise ValueError(f"backend must be one that this machine has, got {backend!r}: {'; '.join(reasons)}")


def errors(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[float, float, str]:
    """Relative error of ``output``, the largest relative error of a gradient, and the name of its parameter.

    A gradient that is nothing but rounding, as a bias's under a normalisation is, would be all error relative to
    itself. So none is taken for smaller than a thousandth of the gradients' root mean square.
    """
    names = [name for name in reference if name != "output"]
    if set(ours) != set(reference):
        missing = ", ".join(sorted(set(ours) ^ set(reference)))
        raise RuntimeError(f"only one side has a gradient for {missing}")
    floor = 1e-3 * statistics.fmean(float(reference[name].double().norm()) ** 2 for name in names) ** 0.5
    gradients = {name: relative_error(ours[name], reference[name], floor) for name in names}
    # NaN is the worst of all, but no number is larger than another that is NaN.
    worst = max(gradients, key=lambda name: float("inf") if gradients[name] != gradients[name] else gradients[name])
    return relative_error(ours["output"], reference["output"]), gradients[worst], worst


def relative_error(ours: Tensor, reference: Tensor, least: float = 0.0) -> float:
    """``|ours - reference| / max(|reference|, least)``, in 2-norms."""
    difference = float((ours.double() - reference.double()).norm())
    return difference / max(float(reference.double().norm()), least, torch.finfo(torch.float64).tiny)


def processor(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


@dataclass(frozen=True)
class _Side:
    """A process that holds one side's model and answers questions."""

    name: str
    process: Any
    connection: Connection

    @classmethod
    @contextmanager
    def started(cls, name: str, build: Build, backend: str, device: str, folder: Path) -> Iterator[_Side]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        arguments = (theirs, build, backend, device, folder / f"{name}.safetensors")
        process = context.Process(target=_serve, args=arguments, daemon=True)
        usual = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the process inherits: Ctrl-C is for us to answer
        try:
            process.start()
        finally:
            signal.signal(signal.SIGINT, usual)
        theirs.close()
        try:
            yield cls(name, process, ours)
        except BaseException:
            process.terminate()
            raise
        finally:
            ours.close()
            process.join(timeout=10)
            if process.is_alive():
                process.terminate()

    def ask(self, *question: Any) -> Any:
        try:
            self.connection.send(question)
            answer = self.connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            self.process.join(timeout=10)
            raise SideFailed(
                f"the {self.name} side died with exit code {self.process.exitcode} at {question[0]!r}; "
                "-9 means that the system ran out of memory: try a shorter context or fewer layers"
            ) from error
        if isinstance(answer, Exception):
            raise SideFailed(f"the {self.name} side failed: {type(answer).__name__}: {answer}") from answer
        return answer


def _serve(connection: Connection, build: Build, backend: str, device: str, path: Path) -> None:
    """What a side's process runs: answers each question with a result, or with the exception that it ended in."""
    try:
        with gdl_kernels.backend(backend):
            worker = _Worker(build(), device)
            while True:
                try:
                    question, *arguments = connection.recv()
                except EOFError:  # the asker is done
                    return
                connection.send(worker.answer(question, path, *arguments))
    except Exception as error:
        connection.send(error if _pickles(error) else RuntimeError(f"{type(error).__name__}: {error}"))


def _pickles(error: Exception) -> bool:
    try:
        multiprocessing.reduction.ForkingPickler.dumps(error)
    except Exception:
        return False
    return True


class _Worker:
    def __init__(self, problem: Problem, device: str) -> None:
        self.problem, self.device = problem, device
        self.optimizer = torch.optim.AdamW(problem.model.parameters(), lr=1e-4)
        self.outputs: dict[str, Tensor] = {}
        self.loss = torch.empty(0)
        self.memory = _Memory(device)

    def answer(self, question: str, path: Path, *arguments: Any) -> Any:
        if question == "about":
            served = {e.op: dict(e.verdicts) for e in self.problem.explain()}
            return sum(p.numel() for p in self.problem.model.parameters()), served, self.problem.phases
        if question == "save":
            return self.save(path)
        return self.run(question, *arguments)

    def run(self, phase: str, first: bool) -> tuple[float, int | None]:
        """Seconds and peak memory of a phase. Of the first run, outputs and gradients are kept.

        First runs give back what they free, so that their memory is what they need; others keep it, as training does.
        """
        if not first:
            keep_freed_memory()
        self.memory.reset()
        self._synchronize()
        begin = time.perf_counter()
        if phase == "forward":
            with torch.no_grad():
                output = self.problem.forward()
            if first:
                self.outputs["output"] = output
        elif phase == "decoding":
            assert self.problem.decode is not None
            with torch.inference_mode():
                output = self.problem.decode()
            if first:
                self.outputs["decoded"] = output
        else:
            self.optimizer.zero_grad()
            loss = self.problem.loss()
            loss.backward()
            self.optimizer.step()
            if first:
                self.loss = loss.detach()
        self._synchronize()
        return time.perf_counter() - begin, self.memory.peak()

    def save(self, path: Path) -> float:
        """Write the first run's outputs and gradients, which the optimiser has left as they were; return its loss."""
        gradients = {n: p.grad for n, p in self.problem.model.named_parameters() if p.grad is not None}
        tensors = {**self.outputs, **gradients}
        save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, path)
        self.outputs.clear()
        return float(self.loss)

    def _synchronize(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)


class _Memory:
    """The peak of this process's memory beyond what it held at construction: on a GPU torch's, else resident pages."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.before = torch.cuda.memory_allocated(device) if device.startswith("cuda") else _resident("VmRSS")
        self.resettable = True

    def reset(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak, VmHWM, back to VmRSS
        except OSError:
            self.resettable = False

    def peak(self) -> int | None:
        if self.device.startswith("cuda"):
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return _resident("VmHWM") - self.before if self.resettable else None


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
