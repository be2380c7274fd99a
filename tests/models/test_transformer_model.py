"""The Transformer, against torch's own and against itself."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gdl_kernels
from models.transformer.attention import causal_layout, full_layout
from models.transformer.conversion import from_torch, to_torch
from models.transformer.model import PRESETS, Config, EncoderDecoder, Transformer, preset

CONFIG = Config(
    13, 13, encoder_layers=2, decoder_layers=3, heads=4, width=32, hidden=40, dropout=0.0, final_norm=True
)  # fmt: skip
S, T = 9, 7


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with gdl_kernels.backend(request.param):
        yield request.param


def stacks(config: Config) -> tuple[EncoderDecoder, nn.Transformer]:
    """Ours and torch's, with the same weights; biases and norms are random, too."""
    theirs = nn.Transformer(
        config.width, config.heads, config.encoder_layers, config.decoder_layers, config.hidden, 0.0,
        config.activation, batch_first=True, norm_first=config.norm == "pre", dtype=torch.float64,
    )  # fmt: skip
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=0.5, std=0.3)
    ours = EncoderDecoder(config).double()
    ours.load_state_dict(from_torch(theirs.state_dict()))
    return ours, theirs


def masks(batch: int) -> tuple[Tensor, Tensor]:
    """Padding of sources anywhere and of targets at the end: torch gives NaN where a query sees nothing."""
    padding = torch.rand(batch, S) < 0.4
    padding[:, 0] = False
    target_padding = torch.arange(T) >= torch.randint(1, T + 1, (batch, 1))
    target_padding[0] = False
    return padding, target_padding


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_is_torchs_own_transformer(norm: Any, activation: str, masked: bool, backend: str) -> None:
    ours, theirs = stacks(replace(CONFIG, norm=norm, activation=activation))
    source = torch.randn(3, S, 32, dtype=torch.float64, requires_grad=True)
    target = torch.randn(3, T, 32, dtype=torch.float64, requires_grad=True)
    padding, target_padding = masks(3) if masked else (None, None)
    causal = torch.ones(T, T, dtype=torch.bool).triu(1)
    expected = theirs(
        source, target, tgt_mask=causal, src_key_padding_mask=padding, tgt_key_padding_mask=target_padding,
        memory_key_padding_mask=padding,
    )  # fmt: skip
    found = ours(source, target, padding, target_padding)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    weight = torch.randn_like(found)
    names, parameters = zip(*theirs.named_parameters())
    wanted = torch.autograd.grad(expected, [source, target, *parameters], weight)
    own = dict(ours.named_parameters())
    got = torch.autograd.grad(found, [source, target, *own.values()], weight)
    torch.testing.assert_close(got[:2], wanted[:2], rtol=1e-10, atol=1e-11)
    gradients = from_torch(dict(zip(names, wanted[2:])))
    assert gradients.keys() == own.keys()
    for name, gradient in zip(own, got[2:]):
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("shared", ["all", "output", "none"])
def test_tokens_to_logits_by_torchs_own_modules(shared: Any, backend: str) -> None:
    model = Transformer(replace(CONFIG, shared=shared, norm="pre")).double()
    theirs = stacks(replace(CONFIG, norm="pre"))[1]
    theirs.load_state_dict(to_torch(model.body.state_dict()))
    source, target = torch.randint(13, (3, S)), torch.randint(13, (3, T))
    padding, _ = masks(3)
    weights = dict(model.named_parameters())
    embedding = weights["target_embedding"]
    source_embedding = weights.get("source_embedding", embedding)
    output = weights.get("output", embedding)
    assert len({id(w) for w in (embedding, source_embedding, output)}) == {"all": 1, "output": 2, "none": 3}[shared]

    def embedded(tokens: Tensor, weight: Tensor) -> Tensor:
        place = torch.arange(tokens.shape[1], dtype=torch.float64)[:, None]
        angle = place / 10_000 ** (torch.arange(0, 32, 2, dtype=torch.float64) / 32)
        return F.embedding(tokens, weight) * math.sqrt(32) + torch.stack([angle.sin(), angle.cos()], -1).flatten(1)

    expected = F.linear(
        theirs(
            embedded(source, source_embedding), embedded(target, embedding), src_key_padding_mask=padding,
            memory_key_padding_mask=padding, tgt_mask=torch.ones(T, T, dtype=torch.bool).triu(1),
        ),
        output,
    )  # fmt: skip
    found = model(source, target, padding)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(found)
    ends = list({id(w): w for w in (embedding, source_embedding, output)}.values())
    for got, wanted in zip(*(torch.autograd.grad(of, ends, weight) for of in (found, expected))):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)


def test_weights_go_to_torch_and_back() -> None:
    ours, theirs = stacks(CONFIG)
    state = to_torch(ours.state_dict())
    assert state.keys() == theirs.state_dict().keys()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(state[name], weight), name
    theirs.load_state_dict(state)


def test_weights_that_are_not_a_transformers_are_refused() -> None:
    ours, theirs = stacks(CONFIG)
    tensor = torch.zeros(3)
    with pytest.raises(ValueError, match=r"state must be a torch\.nn\.Transformer's, got a weight named 'wte\.weight'"):
        from_torch({**theirs.state_dict(), "wte.weight": tensor})
    with pytest.raises(ValueError, match=r"no such weight in a layer: 'encoder.layers.0.norm3.weight'"):
        from_torch({**theirs.state_dict(), "encoder.layers.0.norm3.weight": tensor})
    with pytest.raises(ValueError, match="weights must be an EncoderDecoder's, got one named 'target_embedding'"):
        to_torch({**ours.state_dict(), "target_embedding": tensor})
    with pytest.raises(ValueError, match=r"no such weight in a layer: 'decoder.0.memory.weight'"):
        to_torch({**ours.state_dict(), "decoder.0.memory.weight": tensor})


@pytest.mark.parametrize("shared", ["all", "none"])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_logits_of_decoding_are_those_of_the_whole(norm: Any, shared: Any, backend: str) -> None:
    model = Transformer(replace(CONFIG, norm=norm, shared=shared)).double().eval()
    source, target = torch.randint(13, (3, S)), torch.randint(13, (3, T))
    padding, _ = masks(3)
    with torch.no_grad():
        whole = model(source, target, padding)
        cache = model.cache(model.encode(source, padding), padding, capacity=T)
        parts = [model.decode_next(part, cache) for part in target.split([1, 3, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)
    assert cache.length == T


def test_beams_share_the_keys_of_their_source_and_keep_their_own(backend: str) -> None:
    model = Transformer(CONFIG).double().eval()
    source, padding = torch.randint(13, (2, S)), masks(2)[0]
    target = torch.randint(13, (6, T))
    moved = torch.tensor([2, 0, 0, 4, 3, 5])  # each beam stays with its source
    after = torch.cat([target[moved, :4], target[:, 4:]], 1)
    with torch.no_grad():
        expected = model(source.repeat_interleave(3, 0), after, padding.repeat_interleave(3, 0))
        cache = model.cache(model.encode(source, padding), padding, capacity=T, beams=3)
        model.decode_next(target[:, :4], cache)
        cache.select(moved)
        found = model.decode_next(after[:, 4:], cache)
    assert cache.source[0][0].shape[0] == 2
    torch.testing.assert_close(found, expected[:, 4:], rtol=1e-12, atol=1e-12)


def test_what_comes_later_and_what_is_padding_changes_nothing() -> None:
    model = Transformer(CONFIG).double().eval()
    source, target = torch.randint(13, (2, S)), torch.randint(13, (2, T))
    padding = torch.zeros(2, S, dtype=torch.bool)
    padding[1, 5:] = True
    logits = model(source, target, padding)
    source[1, 5:], target[:, 4:] = 12 - source[1, 5:], (target[:, 4:] + 1) % 13
    other = model(source, target, padding)
    torch.testing.assert_close(other[:, :4], logits[:, :4], rtol=1e-13, atol=1e-13)
    assert not torch.isclose(other[:, 4:], logits[:, 4:]).any(-1).all()
    alone = model(source[1:, :5], target[1:])
    torch.testing.assert_close(alone, other[1:], rtol=1e-12, atol=1e-12)


def test_any_length_is_served_and_layouts_are_found_again() -> None:
    cpu = torch.device("cpu")
    assert causal_layout(3, cpu) is causal_layout(200, cpu)
    assert causal_layout(257, cpu).n_q >= 257
    assert full_layout(3, 41, cpu) is full_layout(200, 41, cpu)
    assert full_layout(3, 41, cpu) is not full_layout(3, 42, cpu)
    model = Transformer(replace(CONFIG, encoder_layers=1, decoder_layers=1)).eval()
    with torch.no_grad():
        logits = model(torch.randint(13, (1, 700)), torch.randint(13, (1, 601)))
    assert logits.shape == (1, 601, 13)
    assert logits.isfinite().all()


def test_what_was_built_while_decoding_serves_training() -> None:
    model = Transformer(CONFIG)
    source, target = torch.randint(13, (2, 61)), torch.randint(13, (2, 1025))  # lengths that no other test has
    with torch.inference_mode():
        model(source, target)
    model(source, target).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_dropout_is_on_sums_and_on_what_is_added_and_only_in_training() -> None:
    """Each place alone: with the others off, two calls in training differ, and the mean of what is kept stays."""
    model = Transformer(replace(CONFIG, dropout=0.5, decoder_layers=1, encoder_layers=1)).double()
    places = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert len(places) == 1 + 2 + 3
    source, target = torch.randint(13, (2, S)), torch.randint(13, (2, T))
    for place in places:
        for other in places:
            other.p = 0.5 if other is place else 0.0
        model.train()
        assert not torch.equal(model(source, target), model(source, target))
        model.eval()
        assert torch.equal(model(source, target), model(source, target))
    assert all(layer.attention.dropout == 0 for layer in [*model.body.encoder, *model.body.decoder])


def test_it_begins_without_an_opinion() -> None:
    """The loss of an untrained model is about that of guessing: a nat more at most, for logits of size 1."""
    model = Transformer(preset("tiny", 118, 118))
    source, target = torch.randint(118, (8, 20)), torch.randint(118, (8, 21))
    loss = F.cross_entropy(model(source, target[:, :-1]).flatten(0, 1), target[:, 1:].flatten())
    assert math.log(118) - 0.3 < loss.item() < math.log(118) + 1


@pytest.mark.parametrize(("name", "published"), [("base", 65e6), ("big", 213e6)])
def test_presets_are_the_published_ones(name: str, published: float) -> None:
    """Table 3; of the vocabulary the paper says that it is about 37,000 tokens."""
    with torch.device("meta"):
        model = Transformer(preset(name, 37_000, 37_000))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(published, rel=0.04)
    assert PRESETS[name].norm == "post"
    assert isinstance(model.body.encoder_norm, nn.Identity)
    assert preset("tiny", 5, 5, norm="pre").ends_with_norm


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"heads": 0}, "heads must be a whole number of at least 1, got 0"),
        ({"hidden": 2.5}, "hidden must be a whole number of at least 1, got 2.5"),
        ({"width": 36}, "width must be a multiple of twice the 4 heads, got 36"),
        ({"dropout": 1.0}, "dropout must be from 0 up to, not including, 1, got 1.0"),
        ({"norm": "first"}, "norm must be one of post, pre, got 'first'"),
        ({"activation": "swish"}, "activation must be one of relu, gelu, got 'swish'"),
        ({"shared": "some"}, "shared must be one of all, output, none, got 'some'"),
        ({"target_vocabulary": 12}, "shared must not be 'all' where the vocabularies differ, got 13 and 12 tokens"),
    ],
)
def test_a_shape_that_can_not_be_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=f"^{why}$"):
        replace(CONFIG, **changes)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="preset must be one of tiny, base, big, got 'huge'"):
        preset("huge", 5, 5)


def test_bad_tokens_are_refused() -> None:
    model = Transformer(CONFIG)
    source, target = torch.randint(13, (2, S)), torch.randint(13, (2, T))
    wrong = copy.deepcopy(source)
    wrong[1, 3] = 13
    with pytest.raises(ValueError, match=r"^source: tokens\[1, 3\] must be from 0 to 12.* got 13"):
        model(wrong, target)
    with pytest.raises(ValueError, match=r"^target: tokens\[1, 3\] must be from 0 to 12.* got 13"):
        model(source, wrong)
    with pytest.raises(TypeError, match=r"^source: tokens must be int64 or int32, got torch\.float32"):
        model(source.float(), target)
    with pytest.raises(ValueError, match=r"^source must be \(batch, at least one position\), got shape \(9,\)"):
        model.encode(source[0])
    with pytest.raises(ValueError, match=r"^target must be \(batch, at least one position\), got shape \(2, 0\)"):
        model(source, target[:, :0])
    with pytest.raises(ValueError, match="target must have the batch of source, 2, got 1"):
        model(source, target[:1])
    with pytest.raises(ValueError, match=r"the padding of source must have its shape, \(2, 9\), got \(2, 8\)"):
        model(source, target, torch.zeros(2, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"the padding of target must have its shape, \(2, 7\), got \(2, 9\)"):
        model(source, target, None, torch.zeros(2, 9, dtype=torch.bool))
