"""Benchmarks of models: every model's cases are right at a small size, and what is wrong in a model shows."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import benchmarks.models
import benchmarks.ops
import gdl_kernels
from benchmarks import model_cases
from benchmarks.__main__ import app
from benchmarks.cases import Candidate
from benchmarks.ceilings import Ceiling
from benchmarks.language import variant
from benchmarks.model_cases import COMPILED, EAGER, FORWARD, OURS, TRAINING, Trial, Variant, served
from benchmarks.results import Result, Row
from benchmarks.runner import run
from benchmarks.timing import Plan
from gdl_kernels import _native
from gdl_kernels._backends import Explanation
from models.compare import Problem
from models.gpt2.comparison import bytes_of_text, problem
from models.gpt2.model import Config, preset

CPU = torch.device("cpu")
PLAN = Plan(seconds=0, min_rounds=2, max_rounds=2)
#: musenet has cases and tests of its own.
MODELS = sorted(found.name for found in pkgutil.iter_modules(benchmarks.models.__path__) if found.name != "musenet")


def _run(name: str, candidate: Candidate) -> Result:
    """Beside a ceiling that takes no time."""
    low, case = Ceiling("add", lambda: torch.ones(8) + 1, 8.0), candidate.build()
    assert case.name == candidate.name
    return run(name, dataclasses.replace(case, ceiling=lambda dtype, device: low), PLAN)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_right_at_a_small_size(name: str) -> None:
    module = importlib.import_module(f"benchmarks.models.{name}")
    results = [_run(name, case) for case in module.cases(CPU, quick=True)]
    assert [result.case.split(", ")[0] for result in results] == [FORWARD, TRAINING]
    for result in results:
        eager, ours = result.rows
        assert (eager.contestant, eager.status) == (EAGER, "timed"), eager.reason
        assert (ours.contestant, ours.ours) == (OURS, True)
        assert ours.status == ("unavailable" if _native.missing("cpu") else "timed"), ours.reason
        assert ours.flops > 1e5
    assert results[1].rows[0].flops > 2 * results[0].rows[0].flops
    assert module.bars(results) == [], "nothing is asked of a quick run's small models"


def test_the_models_are_all_of_those_that_compare_has() -> None:
    commands = (path.parent.name for path in Path("models").glob("*/comparison.py"))
    gans = {"progan", "sagan", "biggan", "stylegan"}
    assert {*MODELS, "musenet"} == {*commands} - {"gans"} | gans


@pytest.mark.parametrize("name", MODELS)
def test_what_is_asked_of_a_model(name: str) -> None:
    module = importlib.import_module(f"benchmarks.models.{name}")
    least = {"stylegan": 1.5, "biggan": 1.3, "sagan": 1.3, "progan": 1.1}.get(name, 1.0)
    for asked in module.VARIANTS:
        rows = [
            Row(EAGER, 1, 0, samples_ms=[3.0] * 3, peak_bytes=30),
            Row(OURS, 1, 0, ours=True, samples_ms=[2.0] * 3, peak_bytes=20),
        ]
        phases = [
            Result(name, asked.case_name(phase), "", "float32", None, 0, Row("mm", 1, 0), rows)
            for phase in (FORWARD, TRAINING)
        ]
        bars = module.bars(phases)
        assert (bars[0].claim, bars[0].asked) == (f"{asked.case_name(TRAINING)}: over {EAGER}", least)
        assert bars[0].measured == 1.5
        memory = [(bar.claim.rpartition(": ")[2], bar.asked, bar.measured) for bar in bars[1:]]
        # Where attention is over many pairs: not over the digits' 8×8 pixels.
        attends = name in ("sagan", "biggan") and "16×16" not in asked.name
        less = attends or "local" in asked.name or "fixed" in asked.name
        assert memory == ([(f"memory of {EAGER} over ours", 1.0, 1.5)] if less else [])


class Drifting(nn.Module):
    """``factor * weight * x``, where every pass moves the factor, as it does the vectors of a spectral norm."""

    factor: Tensor

    def __init__(self, slip: float) -> None:
        super().__init__()
        self.slip = slip
        self.weight = nn.Parameter(torch.linspace(1, 2, 5))
        self.register_buffer("factor", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.factor.mul_(1.5)
        off = 0.0 if gdl_kernels.explain(gdl_kernels.pixel_norm, x).verdicts["reference"] == "chosen" else self.slip
        return self.factor * self.weight.mul(x) + off * self.weight


def drifting(slip: float = 0.0, *, kinks: bool = False) -> Variant:
    """Is off by ``slip`` where it isn't under the backend ``reference``."""

    def build(dtype: torch.dtype, device: str) -> Problem:
        model, x = Drifting(slip).to(dtype), torch.linspace(-1, 3, 10, dtype=torch.float64).view(2, 5).to(dtype)
        explanation = Explanation("pixel_norm", {"cpu": "chosen", "reference": "can"})
        return Problem(model, lambda: model(x), lambda: model(x).square().mean(), lambda: [explanation])

    return Variant("5", "a line", build, kinks=kinks)


def test_every_call_begins_from_the_same_state() -> None:
    trial = Trial.of(drifting().build(torch.float32, "cpu"))
    first, (loss, gradient) = trial.forward(), trial.training_step()
    before = trial.problem.model.weight.detach().clone()
    for _ in range(3):
        (case_forward, case_training) = (c.build() for c in model_cases.cases([drifting()], CPU, quick=True))
        assert torch.equal(case_forward.contestants[-1].function(), first)
        again = case_training.contestants[-1].function()
        assert torch.equal(again[0], loss)
        assert torch.equal(again[1], gradient)
    optimizer = torch.optim.AdamW(trial.problem.model.parameters(), lr=0.0)
    trial.training_step(optimizer)
    assert torch.equal(trial.problem.model.weight, before), "the step moved the weights"
    assert optimizer.state[trial.problem.model.weight]["exp_avg"].abs().max() > 0, "there was no step"
    assert trial.problem.model.weight.grad is None


def test_a_model_is_built_when_the_first_of_its_cases_is_and_once() -> None:
    def build(dtype: torch.dtype, device: str) -> Problem:
        built.append(dtype)
        return drifting().build(dtype, device)

    built: list[torch.dtype] = []
    forward, training = model_cases.cases([dataclasses.replace(drifting(), build=build)], CPU, quick=True)
    assert [forward.name, training.name] == ["forward, 5, fp32", "training step, 5, fp32"]
    assert built == []
    forward.build()
    training.build()
    assert built == [torch.float32]


def test_convolutions_are_in_float32_proper() -> None:
    """On a GPU TF32, which torch takes by default, would be wrong by far."""
    allowed = []

    def look() -> Tensor:
        allowed.append(torch.backends.cudnn.allow_tf32)
        return torch.zeros((), requires_grad=True)

    before = torch.backends.cudnn.allow_tf32
    trial = Trial.of(Problem(nn.Linear(1, 1), look, look, list))
    trial.forward()
    trial.training_step()
    assert allowed == [False, False]
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.skipif(bool(_native.missing("cpu")), reason="ours would be the reference")
@pytest.mark.parametrize(
    ("slip", "kinks", "wrong"),
    [
        (0.0, False, []),
        (1e-4, False, [FORWARD, TRAINING]),
        (1e-4, True, [FORWARD, TRAINING]),  # by its loss, though gradients may be off by more
        (float("nan"), True, [FORWARD, TRAINING]),
    ],
)
def test_what_is_off_is_wrong(slip: float, kinks: bool, wrong: list[str]) -> None:
    results = [_run("line", case) for case in model_cases.cases([drifting(slip, kinks=kinks)], CPU, quick=True)]
    assert [r.case.split(", ")[0] for r in results if r.ours is not None and r.ours.status == "wrong"] == wrong
    assert all(result.rows[0].status == "timed" for result in results), "plain PyTorch is right"


def test_plain_pytorch_that_is_off_is_wrong_too() -> None:
    share, truth = model_cases._share(1e-5, 1e-4), torch.linspace(1, 2, 9, dtype=torch.float64)
    exact, off = truth.float(), truth.float() * (1 + 5e-5)
    assert share(exact, exact, truth) < 0.1
    assert share(off, off, truth) > 2, "more than a rival is allowed"
    near = truth.float() * (1 + 1.5e-5)
    assert share(near, exact, truth) > 1 > share(near, near, truth)


def test_gradients_that_jump_may_be_off_by_more() -> None:
    truth = torch.ones((), dtype=torch.float64), torch.linspace(1, 2, 9, dtype=torch.float64)
    plain = tuple(t.float() for t in truth)
    off = plain[0], plain[1] * (1 + 1e-3)
    for gradient, right in ((1e-4, False), (1e-2, True)):
        assert (model_cases._share(1e-5, gradient)(off, plain, truth) <= 1) == right
    with pytest.raises(ValueError, match="it gave 1 outputs, must be 2"):
        model_cases._share(1e-5, 1e-2)(plain[:1], plain, truth)


def _build(config: Config, dtype: torch.dtype, device: str) -> Problem:
    return problem(config, bytes_of_text(config, 1), dtype, device, seed=0)


def test_operations_are_those_that_are_needed() -> None:
    n, width, layers = 64, 32, 2
    config = preset("tiny", vocabulary=256, context=n, heads=2, width=width, hidden=4 * width, layers=layers)
    forward, training = (c.build() for c in model_cases.cases([variant(_build, config)], CPU, quick=True))
    # Four matrices of attention, two of the MLP, and the table of tokens; each pair is in two products.
    products = n * (layers * (4 + 8) * width**2 + 256 * width)
    pairs = layers * n * (n + 1) // 2 * width
    assert forward.task.flops == 2 * (products + 2 * pairs)
    assert training.task.flops == 2 * 3 * (products + 2 * pairs)
    weights = layers * ((4 + 8) * width**2 + (4 + 4 + 1) * width + 2 * 2 * width) + (256 + n) * width + 2 * width
    assert (forward.task.bytes, training.task.bytes) == (0, 24 * weights)


def test_compiled_rivals_are_in_full_runs_only() -> None:
    names = [
        [contestant.name for contestant in case.build().contestants]
        for quick in (True, False)
        for case in model_cases.cases([drifting()], CPU, quick)
    ]
    assert names == [[EAGER, OURS], [EAGER, OURS], [EAGER, COMPILED, OURS], [EAGER, OURS]]


def test_a_model_is_served_by_all_that_serve_its_ops_or_by_none() -> None:
    cuda = Explanation("pixel_norm", {"reference": "can", "cuda": "chosen", "triton": "no"})
    triton = Explanation("sparse_attention", {"reference": "can", "cuda": "no", "triton": "chosen"})
    fallen = Explanation("adain", {"reference": "chosen", "cuda": "not built"})
    assert served([cuda, triton]).verdicts == {"cuda": "chosen", "triton": "chosen"}
    assert served([cuda, fallen, triton]) is fallen


TINY = """
import torch
from benchmarks.cases import Case, Contestant, Task
from benchmarks.ceilings import Ceiling

def cases(device, quick):
    task = Task(torch.square, torch.square, flops=16.0, bytes=128.0)
    yield Case(CASE, "16", torch.float32, device, lambda g: (torch.randn(16, generator=g),), task,
               [Contestant("eager", torch.square)], lambda *_: Ceiling("add", lambda: torch.ones(8) + 1, 8.0))
    IMPORT

def bars(results):
    return []
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One op, and two models of which one needs what is not there."""
    for package, name, lacks in ((benchmarks.ops, "an_op", ""), (benchmarks.models, "a_model", ""),
                                 (benchmarks.models, "b_model", "import no_such_package")):  # fmt: skip
        folder = tmp_path / package.__name__
        folder.mkdir(exist_ok=True)
        text = TINY.replace("CASE", repr(f"case of {name}")).replace("IMPORT", lacks)
        (folder / f"{name}.py").write_text(text)
        monkeypatch.setattr(package, "__path__", [str(folder)])
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}", raising=False)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("arguments", "measured", "status"),
    [
        ([], {"an_op", "a_model", "b_model"}, 0),
        (["--op", "an_op"], {"an_op"}, 0),
        (["--model", "a_model"], {"a_model"}, 0),
        (["--model", "b_model", "--op", "an_op"], {"an_op", "b_model"}, 1),
    ],
)
def test_all_ops_and_models_unless_one_is_named(arguments: list[str], measured: set[str], status: int) -> None:
    outcome = CliRunner().invoke(app, ["--quick", "--device", "cpu", *arguments])
    assert outcome.exit_code == status, outcome.output
    assert {name for name in ("an_op", "a_model", "b_model") if f"case of {name}" in outcome.output} == measured
    told = "Not measured: b_model (needs no_such_package): pip install -e '.[models]'"
    assert (told in outcome.output) == ("b_model" in measured)
