"""Runs one case: who is there, who is right, and then how long each takes."""

from __future__ import annotations

import gc
import math
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .cases import Candidate, Case, Contestant, Inputs, Task
from .correctness import Outputs, tuple_of
from .launches import launches
from .memory import peak_growth
from .replays import Recording, as_called_ms, own_stream, record
from .results import Result, Row
from .timing import Call, Plan, by_turns

#: Of each task how many sets of inputs are compared, truth and plain; or which of these failed and how.
Answers = dict[Task, tuple[int, Outputs, Outputs] | str]

#: The largest error of fewer numbers than these, in all outputs, is a matter of luck: then more sets of inputs are
#: compared, up to so many, and count as one.
FEW, MOST_SETS = 4096, 8


def run(op: str, candidate: Candidate, plan: Plan, say: Callable[[str], None] = lambda _: None) -> Result:
    """Build and measure one case.

    Every contestant first computes the first set of inputs, or some where outputs are few, which is compared with
    float64 and compiles whatever compiles; then memory, and on a GPU what is launched, are measured over one call;
    those that were right are then timed by turns with the ceiling. On a GPU that is the time of replays, where calls
    can be recorded.

    An exception ends the row that it is in, or the case where it is nobody's, and the result says so.

    Raises:
        ModuleNotFoundError: if building the case needs a package that is not installed.
    """
    try:
        case = candidate.build()
        with own_stream(case.device):
            return _measured(op, case, plan, say)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        return Result.failed(op, candidate.name, one_line(error))
    finally:
        torch.compiler.reset()  # or the next case's compiled rivals count as recompilations of this one's
        gc.collect()  # what this case leaves in cycles may be gigabytes


def one_line(error: Exception) -> str:
    """Its type and message, as much of it as is read in a table."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" …")


def _measured(op: str, case: Case, plan: Plan, say: Callable[[str], None]) -> Result:
    generator = torch.Generator(case.device)
    seed = generator.seed()
    sets = [case.inputs(generator) for _ in range(case.input_sets)]
    answers: Answers = {}
    rows = []
    for contestant in case.contestants:
        say(f"{case.name}: checking {contestant.name}")
        rows.append(_examine(contestant, case, sets, answers))
    answers.clear()

    ceiling = case.ceiling(case.dtype, case.device)
    top = Row(ceiling.name, ceiling.flops, ceiling.bytes)
    turns: list[tuple[Row, Call]] = []
    for contestant, row in zip(case.contestants, rows):
        if row.status == "timed":
            with _failing(row):
                turns.append((row, _rotating(contestant, row, sets)))
    if turns:
        ceiling.call()
        say(f"{case.name}: timing {', '.join(row.contestant for row, _ in turns)}")
        _time([(top, lambda _: ceiling.call()), *turns], plan, case)
    dtype = str(case.dtype).removeprefix("torch.")
    return Result(op, case.name, case.shape, dtype, case.growth, seed, top, rows)


def _time(turns: list[tuple[Row, Call]], plan: Plan, case: Case) -> None:
    """Fills in the samples. A contestant that raises leaves, and the others begin anew: a round is one of all."""
    while len(turns) > 1:  # the ceiling is one
        try:
            recordings = _recordings(turns, case)
            samples = by_turns([recording.replay for recording in recordings], plan, case.device)
        except _Left:
            turns = [(row, call) for row, call in turns if row.status == "timed"]
        else:
            for (row, _), recording, of_row in zip(turns, recordings, samples):
                row.samples_ms = [sample / recording.calls for sample in of_row]
            return


def _recordings(turns: list[tuple[Row, Call]], case: Case) -> list[Recording]:
    """What is timed: on a GPU recordings of all, or where one can't be recorded all as they are called."""
    as_called = [Recording(call, 1) for _, call in turns]
    found = []
    for row, _ in turns:
        row.replayed, row.as_called_ms = False, None
    if case.device.type != "cuda" or not case.recorded:
        return as_called
    times = [as_called_ms(call, case.device) for _, call in turns]
    for (row, call), ms in zip(turns, times):
        recording = record(call, case.input_sets, ms, case.device)
        if recording is None:
            row.status, row.reason = "timed", ""  # it has just run, and fails in a recording alone
            return as_called
        found.append(recording)
    for (row, _), ms in zip(turns, times):
        row.replayed, row.as_called_ms = True, ms
    return found


class _Left(Exception):
    """By a contestant, in the midst of a round."""


@contextmanager
def _failing(row: Row) -> Iterator[None]:
    """An exception inside leaves the row without a time, and goes no further."""
    try:
        yield
    except Exception as error:
        row.status, row.reason = "failed", one_line(error)


def _rotating(contestant: Contestant, row: Row, sets: list[Inputs]) -> Call:
    prepared = [_prepared(contestant, inputs) for inputs in sets]

    def call(i: int) -> object:
        try:
            return contestant.function(*prepared[i % len(prepared)])
        except Exception as error:
            row.status, row.reason = "failed", one_line(error)
            raise _Left from error

    return call


def _prepared(contestant: Contestant, inputs: Inputs) -> Inputs:
    return inputs if contestant.setup is None else contestant.setup(*inputs)


def _examine(contestant: Contestant, case: Case, sets: list[Inputs], answers: Answers) -> Row:
    task = contestant.task or case.task
    row = Row(contestant.name, task.flops, task.bytes, yardstick=contestant.task is not None)
    with _failing(row):
        prepared = _right(row, contestant, task, sets, answers)
        if prepared is not None:
            row.peak_bytes = peak_growth(lambda: contestant.function(*prepared), case.device)
            row.launches = launches(lambda: contestant.function(*prepared), case.device)
    return row


def _right(row: Row, contestant: Contestant, task: Task, sets: list[Inputs], answers: Answers) -> Inputs | None:
    """What a contestant is called with, if it is there and right; else the row says why not."""
    if contestant.explain is not None:
        row.ours = True
        verdicts = contestant.explain(*sets[0]).verdicts
        row.backend = ", ".join(name for name, verdict in verdicts.items() if verdict == "chosen")
        if row.backend == "reference":
            others = "; ".join(f"{name}: {why}" for name, why in verdicts.items() if name != "reference")
            row.status, row.reason = "unavailable", f"reference would serve it ({others})"
            return None
    if task not in answers:
        answers[task] = _answer(task, sets)
    answer = answers[task]
    if isinstance(answer, str):
        row.status, row.reason = "failed", answer
        return None
    count, truth, plain = answer
    try:
        prepared = [_prepared(contestant, inputs) for inputs in sets[:count]]
        outputs = plain
        if contestant.function is not task.plain:
            outputs = _as_one([_compared(task, contestant.function(*inputs)) for inputs in prepared])
    except Exception as error:  # a rival may be unable to serve a call, in any way of its own
        row.status, row.reason = "failed" if row.ours else "unavailable", one_line(error)
        return None
    try:
        share = task.share(outputs, plain, truth)
    except ValueError as error:
        row.status, row.reason = "wrong", str(error)
        return None
    row.error = share if math.isfinite(share) else None  # JSON has no infinity
    # A rival has no such rule for its rounding: up to twice what ours is allowed, it is right.
    if share > (1 if row.ours else 2):
        row.status, row.reason = "wrong", f"its error against float64 is {share:.3g} times what is allowed"
        return None
    return prepared[0]


def _answer(task: Task, sets: list[Inputs]) -> tuple[int, Outputs, Outputs] | str:
    what = "the truth"
    try:
        truths = [task.truth(*map(_double, sets[0]))]
        numbers = sum(output.numel() for output in tuple_of(truths[0]))
        count = 1 if numbers >= FEW else min(len(sets), MOST_SETS)
        truths += [task.truth(*map(_double, inputs)) for inputs in sets[1:count]]
        what = "plain PyTorch"
        return count, _as_one(truths), _as_one([task.plain(*inputs) for inputs in sets[:count]])
    except Exception as error:
        return f"{what}: {one_line(error)}"


def _as_one(outputs: list[Outputs]) -> Outputs:
    """The outputs of several sets of inputs, each with one dimension more; of one set they are as they are."""
    if len(outputs) == 1:
        return outputs[0]
    stacked = tuple(torch.stack(each) for each in zip(*map(tuple_of, outputs)))
    return stacked[0] if isinstance(outputs[0], Tensor) else stacked


def _compared(task: Task, outputs: Outputs) -> Outputs:
    return task.compared(outputs) if isinstance(outputs, Tensor) else tuple(map(task.compared, outputs))


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
