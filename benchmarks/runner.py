"""Runs one case: who is there, who is right, and then how long each takes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .cases import Case, Contestant, Inputs, Task
from .correctness import Outputs, error_share
from .launches import launches
from .memory import peak_growth
from .results import Result, Row
from .timing import Call, Plan, by_turns


def run(op: str, case: Case, plan: Plan, say: Callable[[str], None] = lambda _: None) -> Result:
    """Measure one case.

    Every contestant first computes the first set of inputs, which is compared with float64 and compiles whatever
    compiles; then memory, and on a GPU what is launched, are measured over one call; those that were right are then
    timed by turns with the ceiling.
    """
    generator = torch.Generator(case.device)
    seed = generator.seed()
    sets = [case.inputs(generator) for _ in range(case.input_sets)]
    answers: dict[Task, tuple[Outputs, Outputs]] = {}
    rows = []
    for contestant in case.contestants:
        say(f"{case.name}: checking {contestant.name}")
        rows.append(_examine(contestant, case, sets[0], answers))
    answers.clear()

    ceiling = case.ceiling(case.dtype, case.device)
    top = Row(ceiling.name, ceiling.flops, ceiling.bytes)
    calls: list[Call] = [lambda _: ceiling.call()]
    timed = [top]
    for contestant, row in zip(case.contestants, rows):
        if row.status == "timed":
            calls.append(_rotating(contestant, sets))
            timed.append(row)
    if len(timed) > 1:
        ceiling.call()
        say(f"{case.name}: timing {', '.join(row.contestant for row in timed)}")
        for row, samples in zip(timed, by_turns(calls, plan, case.device)):
            row.samples_ms = samples
    torch.compiler.reset()  # or the next case's compiled rivals count as recompilations of this one's
    dtype = str(case.dtype).removeprefix("torch.")
    return Result(op, case.name, case.shape, dtype, case.growth, seed, top, rows)


def _rotating(contestant: Contestant, sets: list[Inputs]) -> Call:
    prepared = [_prepared(contestant, inputs) for inputs in sets]
    return lambda i: contestant.function(*prepared[i % len(prepared)])


def _prepared(contestant: Contestant, inputs: Inputs) -> Inputs:
    return inputs if contestant.setup is None else contestant.setup(*inputs)


def _examine(contestant: Contestant, case: Case, inputs: Inputs, answers: dict[Task, tuple[Outputs, Outputs]]) -> Row:
    task = contestant.task or case.task
    row = Row(contestant.name, task.flops, task.bytes, yardstick=contestant.task is not None)
    if contestant.explain is not None:
        row.ours = True
        verdicts = contestant.explain(*inputs).verdicts
        row.backend = next((name for name, verdict in verdicts.items() if verdict == "chosen"), "")
        if row.backend == "reference":
            others = "; ".join(f"{name}: {why}" for name, why in verdicts.items() if name != "reference")
            row.status, row.reason = "unavailable", f"reference would serve it ({others})"
            return row
    if task not in answers:
        answers[task] = task.truth(*map(_double, inputs)), task.plain(*inputs)
    truth, plain = answers[task]
    try:
        prepared = _prepared(contestant, inputs)
        outputs = plain if contestant.function is task.plain else _compared(task, contestant.function(*prepared))
    except Exception as error:  # a rival may fail in any way; the row says how
        row.status, row.reason = "wrong" if row.ours else "unavailable", f"{type(error).__name__}: {error}"
        return row
    try:
        share = error_share(outputs, plain, truth)
    except ValueError as error:
        row.status, row.reason = "wrong", str(error)
        return row
    row.error = share if math.isfinite(share) else None  # JSON has no infinity
    # A rival has no such rule for its rounding: up to twice what ours is allowed, it is right.
    if share > (1 if row.ours else 2):
        row.status, row.reason = "wrong", f"its error against float64 is {share:.3g} times what is allowed"
        return row
    del outputs
    row.peak_bytes = peak_growth(lambda: contestant.function(*prepared), case.device)
    row.launches = launches(lambda: contestant.function(*prepared), case.device)
    return row


def _compared(task: Task, outputs: Outputs) -> Outputs:
    return task.compared(outputs) if isinstance(outputs, Tensor) else tuple(map(task.compared, outputs))


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
