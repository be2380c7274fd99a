"""Comparing a model on our kernels with the reference."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import gdl_kernels
from gdl_kernels import _native
from gdl_kernels._backends import Explanation
from gdl_kernels.layouts import causal
from models import report
from models.__main__ import application
from models.compare import Build, Comparison, Measurement, Problem, SideFailed, _Side, compare, errors
from models.musenet.data import Piece, stream
from models.musenet.tokens import CHORALES


def random_problem(seed: int | None) -> Problem:
    """A linear model; without a seed, another one in each process."""
    torch.manual_seed(os.getpid() if seed is None else seed)
    model, x = nn.Linear(7, 5), torch.randn(20, 7)
    served = Explanation("sparse_attention", {"cpu": "chosen", "reference": "can"})
    return Problem(model, lambda: model(x), lambda: model(x).square().mean(), lambda: [served])


def failing_problem() -> Problem:
    raise ValueError("there is no such music")


def dying_problem() -> Problem:
    os._exit(7)


def test_musenet_agrees_with_itself_in_plain_pytorch(tmp_path: Path) -> None:
    path = tmp_path / "figures" / "compare.json"
    arguments = ["compare", "musenet", "--context", "256", "--layers", "2", "--width", "64", "--repetitions", "1"]
    result = CliRunner().invoke(application(), [*arguments, "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert "differs" not in result.output
    figures = json.loads(path.read_text())
    assert figures["agree"]
    assert figures["config"]["context"] == 256
    assert {"date", "commit", "modified"} <= figures.keys()  # which the docs' tables tell
    served = figures["backends"]["sparse_attention"]
    kernels = served["reference"] != "chosen"
    assert list(figures["phases"]) == ["forward", "decoding", "training step"]
    for phase in figures["phases"]:
        measured = figures["phases"][phase]
        assert measured["reference"]["seconds"] > 0
        assert (measured["speedup"] is not None) == kernels
    if kernels:  # two different programs do not round alike: equal numbers would mean that the same one ran twice
        assert 0 < figures["output_error"] < 1e-5
        assert 0 < figures["decoding_error"] < 1e-5
        assert 0 < figures["gradient_error"] < 1e-4
    else:
        assert "No kernel of ours served this" in result.output


def test_other_weights_are_a_disagreement() -> None:
    found = compare(partial(random_problem, None), repetitions=1)
    assert not found.agree
    assert found.speedup("forward") is None
    assert found.output_error > 1e-3
    assert found.as_json()["agree"] is False
    assert list(found.measured) == ["forward", "training step"]
    assert found.decoding_error is None


def decoding_problem() -> Problem:
    """Decodes something else on our side."""
    ours = gdl_kernels.explain("sparse_attention", *[torch.ones(1, 1, 1, 8)] * 3, causal(1)).verdicts["reference"]
    decoded = torch.ones(6) * (1 if ours == "chosen" else 1.001)
    return replace(random_problem(3), decode=lambda: decoded)


@pytest.mark.skipif(bool(_native.missing("cpu")), reason="both sides would be the reference")
def test_what_is_decoded_is_compared_too() -> None:
    found = compare(decoding_problem, backend="cpu", repetitions=1)
    assert found.decoding_error == pytest.approx(1e-3, rel=1e-3)
    assert not found.agree
    assert list(found.measured) == ["forward", "decoding", "training step"]


def test_a_disagreement_ends_with_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    from models import compare as module

    nan = float("nan")
    sides = {side: Measurement(1.0, 0.0, 10) for side in module.SIDES}
    wrong = Comparison(
        torch.float32, "cpu", 9, 1, {"sparse_attention": {"cpu": "chosen"}}, nan, dict.fromkeys(module.SIDES, nan),
        1e-7, "embedding.weight", dict.fromkeys(module.PHASES, sides),
    )  # fmt: skip
    monkeypatch.setattr(module, "compare", lambda *args, **kwargs: wrong)
    result = CliRunner().invoke(application(), ["compare", "musenet", "--context", "256"])
    assert result.exit_code == 1
    assert "differs" in result.output
    assert "×[/]" not in result.output


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (failing_problem, "kernels side failed: ValueError: there is no such music"),
        (dying_problem, "kernels side died with exit code 7"),
    ],
)
def test_a_side_that_fails_says_why(build: Build, message: str, tmp_path: Path) -> None:
    with (
        _Side.started("kernels", build, "auto", "cpu", tmp_path) as side,
        pytest.raises(SideFailed, match=message),
    ):
        side.ask("about")


def sleeping_problem() -> Problem:
    time.sleep(60)
    raise AssertionError("nobody waits for this")


def test_ctrl_c_is_left_to_the_asker(tmp_path: Path) -> None:
    with _Side.started("kernels", partial(random_problem, 3), "auto", "cpu", tmp_path) as side:
        answer = side.ask("about")
        os.kill(side.process.pid, signal.SIGINT)
        assert side.ask("about") == answer
    assert side.process.exitcode == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nobody_waits_for_a_side_that_is_given_up(tmp_path: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt), _Side.started("kernels", sleeping_problem, "auto", "cpu", tmp_path) as side:
        raise KeyboardInterrupt
    assert side.process.exitcode == -signal.SIGTERM
    assert time.monotonic() - begin < 8


def test_errors_are_relative_and_find_the_worst() -> None:
    reference = {
        "output": torch.randn(50),
        "a": torch.randn(30),
        "b": torch.randn(40),
        "rounding": torch.randn(9) * 1e-9,
    }
    ours = {name: tensor.clone() for name, tensor in reference.items()}
    assert errors(ours, reference)[:2] == (0.0, 0.0)
    ours["output"] *= 1 + 1e-3
    ours["b"] *= 1 - 1e-2
    ours["rounding"] *= -1  # which no one is to care about
    output, gradient, worst = errors(ours, reference)
    assert output == pytest.approx(1e-3, rel=1e-3)
    assert (gradient, worst) == (pytest.approx(1e-2, rel=1e-3), "b")


def test_nan_is_the_worst_error() -> None:
    reference = {name: torch.randn(5) for name in ("output", "a", "b", "c")}
    ours = {**reference, "a": reference["a"] * 3, "b": torch.full((5,), torch.nan)}
    _, gradient, worst = errors(ours, reference)
    assert gradient != gradient
    assert worst == "b"


def test_a_gradient_on_one_side_only_is_an_error() -> None:
    reference = {name: torch.randn(5) for name in ("output", "a", "b")}
    with pytest.raises(RuntimeError, match="gradient for b"):
        errors({"output": reference["output"], "a": reference["a"]}, reference)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [({"repetitions": 0}, "repetitions"), ({"backend": "abacus"}, "backend"), ({"dtype": torch.int32}, "dtype")],
)
def test_bad_arguments_are_refused_before_anything_starts(arguments: dict, what: str) -> None:
    with pytest.raises(ValueError, match=f"^{what} must"):
        compare(failing_problem, **arguments)


def test_a_backend_that_this_machine_lacks_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "missing", lambda backend: [f"no {backend} here"] if backend == "triton" else [])
    with pytest.raises(ValueError, match="backend must be one that this machine has, got 'triton': no triton here"):
        compare(failing_problem, backend="triton")
    monkeypatch.delattr("models.musenet.comparison.chorales")  # what the command would begin with
    result = CliRunner().invoke(application(), ["compare", "musenet", "--backend", "triton"])
    assert "backend must be one that this machine has" in str(result.exception)


@pytest.mark.parametrize("device", ["meta", "cuda:", "cuda:x", "gpu", "cpu:0", "mps"])
def test_a_device_is_a_cpu_or_gpu(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.delattr("models.musenet.comparison.chorales")  # what would begin
    result = CliRunner().invoke(application(), ["compare", "musenet", "--device", device])
    assert isinstance(result.exception, ValueError)
    assert f"device must be cpu, cuda or cuda:N, got {device!r}" in str(result.exception)


def test_a_context_longer_than_all_chorales_is_refused(pieces: list[Piece], monkeypatch: pytest.MonkeyPatch) -> None:
    from models.musenet import comparison

    asked = []
    many = pieces * 6

    def first(limit: int) -> list[Piece]:
        asked.append(limit)
        return [piece for place, piece in enumerate(many[:limit]) if place % 3]  # others lack a voice

    monkeypatch.setattr(comparison, "chorales", first)
    tokens = stream([piece for place, piece in enumerate(many) if place % 3], CHORALES).tolist()
    assert comparison.chorale_tokens(len(tokens) - 1) == tokens
    with pytest.raises(ValueError, match=f"context must be less than the chorales' {len(tokens)} tokens"):
        comparison.chorale_tokens(len(tokens))
    asked.clear()
    assert comparison.chorale_tokens(99) == tokens[:100]
    assert asked == [8]


def test_small_figures_are_shown_as_such() -> None:
    assert [report.duration(s) for s in (0.00123, 0.9999, 1.0, 12.345)] == ["1.23 ms", "999.90 ms", "1.00 s", "12.35 s"]
    assert [report.count(n) for n in (34_567, 999_999, 1_234_567)] == ["34.6 thousand", "1000.0 thousand", "1.2 M"]


def test_the_backend_asked_for_is_the_one_that_is_explained() -> None:
    from models.musenet.comparison import problem
    from models.musenet.model import Config

    config = Config(vocabulary=2000, context=64, layers=1, heads=2, width=16, stride=32, summary=16)
    made = problem(config, list(range(65)), 2, torch.float32, "cpu", 0)
    with gdl_kernels.backend("reference"):
        explained = made.explain()
    assert [e.op for e in explained] == ["sparse_attention", "positional_embedding"]
    assert all(e.verdicts["reference"] == "chosen" for e in explained)
    assert made.forward().shape == (2, 64, 2000)
