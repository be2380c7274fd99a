"""GPT-2 goes on with texts."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from peers import shake
from torch import Tensor

from models.drawing import Drawing, streams
from models.gpt2.generation import generate
from models.gpt2.huggingface import to_huggingface
from models.gpt2.model import GPT2, Config

CONFIG = Config(vocabulary=50, context=32, layers=2, heads=4, width=32, hidden=40)


def build(attention: Any = None) -> GPT2:
    model = GPT2(replace(CONFIG, attention=attention)).eval()
    shake(model)
    with torch.no_grad():  # or one token, or the last, would be the likeliest everywhere
        model.norm.bias.zero_()
        model.position.weight.mul_(8)
    return model


def prompt(batch: int = 3, n: int = 9) -> Tensor:
    return torch.randint(50, (batch, n))


def test_greedy_is_transformers_own_and_fills_the_context() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # read as it is imported
    pytest.importorskip("transformers", minversion="5.24", reason="transformers 5.24 or newer is not installed")
    model, begun = build(), prompt()
    found = torch.stack(list(generate(model, begun)), 1)
    assert found.shape == (3, 32 - 9 + 1)  # the last token drawn needs no place in the context
    assert len(found.unique()) > 3
    expected = to_huggingface(model).generate(
        begun, attention_mask=torch.ones_like(begun), max_new_tokens=23, do_sample=False, pad_token_id=0
    )
    assert torch.equal(torch.cat([begun, found[:, :23]], 1), expected)


@pytest.mark.parametrize("entry", [None, {"pattern": "local", "window": 6}], ids=["dense", "local"])
def test_a_drawn_text_is_what_each_draws_from_the_whole_so_far(entry: Any) -> None:
    model, begun, drawing = build(entry), prompt(2), Drawing(temperature=1.5, top_k=20, top_p=0.9)
    found = torch.stack(list(islice(generate(model, begun, drawing=drawing, generators=streams(7, 2)), 12)), 1)
    for text in range(2):  # one by one, and without a cache
        written, (generator,) = begun[text : text + 1], streams(7 + text, 1)
        for token in found[text]:
            with torch.no_grad():
                drawn = drawing.draw(model(written)[:, -1], [generator])
            assert drawn == token
            written = torch.cat([written, drawn[:, None]], 1)
    assert not torch.equal(found[0], found[1])


def test_errors() -> None:
    model = build()
    with pytest.raises(ValueError, match="prompt must have at most the context's 32 tokens, got 33"):
        generate(model, prompt(n=33))
    with pytest.raises(ValueError, match="prompt must be from 0 to 49, got 50"):
        generate(model, torch.tensor([[50]]))
    with pytest.raises(ValueError, match=r"prompt must be \(batch, positions\), at least one"):
        generate(model, torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="top_k must be from 1 to 50, got 51"):
        generate(model, prompt(), drawing=Drawing(top_k=51))
    with pytest.raises(ValueError, match="generators must be one for each of the 3 texts, got 2"):
        generate(model, prompt(), generators=streams(0, 2))
