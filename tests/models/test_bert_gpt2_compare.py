"""Comparing BERT and GPT-2 on our kernels with plain PyTorch, from the command line."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import gdl_kernels
from models.__main__ import application
from models.bert.comparison import pairs_of_segments
from models.bert.comparison import problem as bert_problem
from models.bert.masking import CLS, FIRST_UNUSED, MASK, SEP
from models.bert.model import preset as bert_preset
from models.gpt2.comparison import bytes_of_text
from models.gpt2.comparison import problem as gpt2_problem
from models.gpt2.model import preset as gpt2_preset
from models.gpt2.text import decode
from models.text import reference

LOCAL = {"pattern": "local", "window": 32}


@pytest.mark.parametrize("model", ["bert", "gpt2"])
def test_it_agrees_and_says_how_much(model: str, tmp_path: Path) -> None:
    path = tmp_path / "compare.json"
    arguments = ["--preset", "tiny", "--context", "128", "--batch", "2", "--repetitions", "1", "--json", str(path)]
    result = CliRunner().invoke(
        application(), ["compare", model, *arguments, "--attention", json.dumps([LOCAL, None])], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    assert "local(window=32) and dense attention, 2 × 128 bytes" in " ".join(result.output.split())  # of wrapped lines
    figures = json.loads(path.read_text())
    assert figures["agree"]
    assert figures["model"] == model
    assert figures["config"]["attention"] == [LOCAL, None]
    kernels = figures["backends"]["sparse_attention"]["reference"] != "chosen"
    for phase in ("forward", "training step"):
        assert (figures["phases"][phase]["speedup"] is not None) == kernels
    if kernels:  # two different programs do not round alike
        assert figures["output_error"] > 0


def test_berts_input_is_two_segments_of_text() -> None:
    config = bert_preset("tiny", context=41)
    tokens, token_types = pairs_of_segments(config, 2)
    assert tokens.shape == token_types.shape == (2, 41)
    for sample, (row, types) in enumerate(zip(tokens.tolist(), token_types.tolist())):
        assert (row[0], row[20], row[40]) == (CLS, SEP, SEP)
        text = bytes(token - FIRST_UNUSED for token in [*row[1:20], *row[21:40]])
        assert text == reference()[38 * sample : 38 * (sample + 1)]
        assert types == [0] * 21 + [1] * 20


def test_gpt2s_input_is_text() -> None:
    tokens = bytes_of_text(gpt2_preset("tiny", context=30), 2)
    assert decode(tokens.flatten().tolist()) == reference()[:62]


def test_a_problem_is_the_same_at_every_call_and_trains_on_what_is_hidden() -> None:
    small = {"context": 40, "dropout": 0.0, "attention_dropout": 0.0}
    bert, gpt2 = bert_preset("tiny", **small), gpt2_preset("tiny", **small)
    problems = (
        (bert, partial(bert_problem, bert, *pairs_of_segments(bert, 2))),
        (gpt2, partial(gpt2_problem, gpt2, bytes_of_text(gpt2, 2))),
    )
    for config, make in problems:
        first, second = (make(torch.float32, "cpu", 5) for _ in range(2))
        assert torch.equal(first.forward(), second.forward())
        loss = first.loss()
        assert torch.equal(loss, second.loss())
        assert loss.item() == pytest.approx(torch.tensor(float(config.vocabulary)).log().item(), rel=0.05)
        with gdl_kernels.backend("reference"):
            (explained,) = first.explain()
        assert explained.verdicts["reference"] == "chosen"
    seen = []
    config = bert_preset("tiny", context=400)
    problem = bert_problem(config, *pairs_of_segments(config, 1), torch.float32, "cpu", 5)
    problem.model.bert.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    problem.forward()
    problem.loss()
    assert MASK not in seen[0]
    assert (seen[1] == MASK).sum() == pytest.approx(0.12 * 400, rel=0.4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bert", "--preset", "huge"], "preset must be one of tiny, mini"),
        (["gpt2", "--preset", "huge"], "preset must be one of tiny, small"),
        (["bert", "--batch", "0"], "batch must be at least 1, got 0"),
        (["gpt2", "--attention", "local"], "attention must be JSON, such as .* got 'local'"),
        (["gpt2", "--attention", "5"], "attention must be .* got 5"),
        (["bert", "--attention", '[{"pattern": "local", "window": 9}]', "--layers", "2"], "an entry for each of the 2"),
        (["bert", "--attention", '{"pattern": "local", "size": 9}'], "the pattern 'local' has other arguments"),
        (["bert", "--dtype", "float8"], "dtype must be one of float32"),
        (["bert", "--preset", "tiny", "--context", "4"], "context 5 for pairs of segments, got 2 and 4"),
        (["gpt2", "--preset", "tiny", "--context", "99999999"], "bytes of text must be at most"),
    ],
)
def test_mistakes_are_told_before_a_side_starts(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.compare._Side.started", lambda *_: pytest.fail("a side was started"))
    result = CliRunner().invoke(application(), ["compare", *arguments])
    assert isinstance(result.exception, ValueError)
    with pytest.raises(ValueError, match=message):
        raise result.exception
