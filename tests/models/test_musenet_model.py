"""The model against peers, and against itself."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import gdl_kernels
from models.musenet.model import PRESETS, Config, MuseNet, bits_per_token, preset
from models.musenet.patterns import ATTENTION, Attention, layer_layouts
from models.musenet.places import ROWS, Places

CONFIG = Config(vocabulary=60, context=160, layers=2, heads=6, width=48, stride=32, summary=8)


def build(attention: Attention, seed: int = 0, **changes: object) -> MuseNet:
    torch.manual_seed(seed)
    model = MuseNet(replace(CONFIG, attention=attention, **changes)).double()
    for parameter in model.parameters():  # biases and gains start at 0 and 1: that would hide mistakes in them
        nn.init.normal_(parameter, std=0.2)
    return model


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(CONFIG.vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def expected_mask(attention: str, layer: int, head: int, n: int, stride: int, summary: int) -> Tensor:
    mask = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        for j in range(i + 1):
            run = i // stride == j // stride
            end = stride - head % (stride // summary) * summary
            column = end - summary <= j % stride < end
            mask[i, j] = {
                "dense": True,
                "merged": run or column,
                "interleaved": column if layer % 2 else run,
                "per_head": column if head % 2 else run,
            }[attention]
    return mask


@pytest.mark.parametrize("attention", ATTENTION)
def test_patterns_are_the_sparse_transformers(attention: Attention) -> None:
    n, stride, summary, heads = 96, 32, 16, 4
    found = layer_layouts(attention, layers=3, heads=heads, context=n, stride=stride, summary=summary)
    for layer, layout in enumerate(found):
        mask = layout.dense_mask().expand(heads, n, n)
        for head in range(heads):
            assert torch.equal(mask[head], expected_mask(attention, layer, head, n, stride, summary)), (layer, head)


def test_dense_is_torchs_own_transformer() -> None:
    model = build("dense")
    peer = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(
            CONFIG.width, CONFIG.heads, 4 * CONFIG.width, 0.0, "gelu", batch_first=True, norm_first=True
        ),
        CONFIG.layers, norm=nn.LayerNorm(CONFIG.width), enable_nested_tensor=False,
    ).double()  # fmt: skip
    names = {
        "attention_norm": "norm1", "mlp_norm": "norm2", "attention.out": "self_attn.out_proj",
        "attention.qkv.": "self_attn.in_proj_", "mlp.0": "linear1", "mlp.2": "linear2",
    }  # fmt: skip
    weights = {"norm." + name: weight for name, weight in model.norm.state_dict().items()}
    for name, weight in model.blocks.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        weights[f"layers.{name}"] = weight
    peer.load_state_dict(weights)

    given = tokens(2, 150)
    place = torch.arange(150.0, dtype=torch.float64)[:, None]
    rate = torch.tensor([10_000 ** (-2 * i / CONFIG.width) for i in range(CONFIG.width // 2)], dtype=torch.float64)
    positions = torch.zeros(150, CONFIG.width, dtype=torch.float64)
    positions[:, 0::2], positions[:, 1::2] = torch.sin(place * rate), torch.cos(place * rate)
    x = model.embedding.weight[given] * math.sqrt(CONFIG.width) + positions
    hidden = peer(x, mask=nn.Transformer.generate_square_subsequent_mask(150, dtype=torch.float64), is_causal=True)
    torch.testing.assert_close(model(given), hidden @ model.embedding.weight.T, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attention", ATTENTION)
def test_our_kernels_and_the_reference_agree(attention: Attention) -> None:
    model, given = build(attention), tokens(2, 161)
    ours = torch.autograd.grad(bits_per_token(model, given), list(model.parameters()))
    with gdl_kernels.backend("reference"):
        reference = torch.autograd.grad(bits_per_token(model, given), list(model.parameters()))
    for name, a, b in zip(dict(model.named_parameters()), ours, reference):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("attention", ATTENTION)
def test_cached_decoding_is_the_full_forward(attention: Attention) -> None:
    model, given = build(attention), tokens(2, CONFIG.context)
    with torch.no_grad():
        full, cache = model(given), model.cache(batch=2)
        parts = [model(given[:, :70], cache), model(given[:, 70:71], cache), model(given[:, 71:90], cache)]
        parts += [model(given[:, i : i + 1], cache) for i in range(90, CONFIG.context)]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="context"):
        model(given[:, :1], cache)


@pytest.mark.parametrize("attention", ATTENTION)
def test_no_token_sees_a_later_one(attention: Attention) -> None:
    model, given = build(attention), tokens(1, 120)
    changed = given.clone()
    changed[:, 77] = (changed[:, 77] + 1) % CONFIG.vocabulary
    with torch.no_grad():
        before, after = model(given), model(changed)
    assert torch.equal(before[:, :77], after[:, :77])
    assert not torch.equal(before[:, 77], after[:, 77])


def test_recompute_gives_the_same_gradients() -> None:
    given, gradients = tokens(2, 161), []
    for recompute in (False, True):
        model = build("merged", recompute=recompute, dropout=0.2).train()
        torch.manual_seed(5)  # the same dropout in both, and in both runs of a recomputed block
        gradients.append(torch.autograd.grad(bits_per_token(model, given), list(model.parameters())))
    for plain, recomputed in zip(*gradients):
        assert torch.equal(plain, recomputed)


PLACED = dict.fromkeys(ROWS, True)


def places(*shape: int, seed: int = 2) -> Places:
    generator = torch.Generator().manual_seed(seed)
    return Places(*(torch.randint(rows, shape, generator=generator) for rows in ROWS.values()))


def test_a_row_of_each_table_is_added_to_the_embedding() -> None:
    model, given, placed = build("merged", **PLACED), tokens(2, 100), places(2, 100)
    plain = build("merged")
    weights = model.state_dict()
    plain.load_state_dict({name: weight for name, weight in weights.items() if not name.startswith("places.")})

    def add(module: nn.Module, inputs: object, embedded: Tensor) -> Tensor:
        return embedded + sum(weights[f"places.{name}.weight"][rows] for name, rows in placed._asdict().items())

    before = plain(given)
    plain.embedding.register_forward_hook(add)
    torch.testing.assert_close(model(given, places=placed), plain(given), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(before, plain(given))


@pytest.mark.parametrize("name", ROWS)
def test_each_place_can_be_had_alone(name: str) -> None:
    model = build("merged", **{name: True})
    assert {table for table in model.state_dict() if "places" in table} == {f"places.{name}.weight"}
    given, placed = tokens(1, 50), places(1, 50)
    others = places(1, 50, seed=3)
    assert torch.equal(
        model(given, places=placed), model(given, places=others._replace(**{name: getattr(placed, name)}))
    )
    assert not torch.equal(model(given, places=placed), model(given, places=others))


def test_a_new_model_has_no_opinion_of_places() -> None:
    torch.manual_seed(0)
    model = MuseNet(replace(CONFIG, **PLACED))
    given = tokens(1, 60)
    assert torch.equal(model(given, places=places(1, 60)), model(given, places=places(1, 60, seed=3)))
    bits_per_token(model, given, places(1, 60)).backward()
    for name in ROWS:
        met = getattr(places(1, 60), name)[0, :-1].unique()
        rows = model.places[name].weight.grad.abs().sum(1)
        assert (rows[met] > 0).all()
        assert (rows > 0).sum() == len(met)


def test_cached_decoding_with_places_is_the_full_forward() -> None:
    model, given, placed = build("merged", **PLACED), tokens(2, 60), places(2, 60)
    with torch.no_grad():
        full, cache = model(given, places=placed), model.cache(batch=2)
        parts = [model(given[:, a:b], cache, places=placed.span(a, b)) for a, b in ((0, 40), (40, 41), (41, 60))]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-9, atol=1e-9)


def test_places_that_do_not_fit_are_refused() -> None:
    model, given, placed = build("merged", elapsed=True, part=True), tokens(1, 20), places(1, 20)
    with pytest.raises(ValueError, match="places must be given: the model has embeddings of elapsed, part"):
        model(given)
    with pytest.raises(ValueError, match=r"places\.part must be like tokens, \(1, 20\), got \(1, 19\)"):
        model(given, places=placed._replace(part=placed.part[:, 1:]))
    with pytest.raises(ValueError, match=r"places\.part must be from 0 to 128, got 129"):
        model(given, places=placed._replace(part=placed.part + 129 - placed.part.max()))
    with pytest.raises(ValueError, match=r"places\.elapsed must be from 0 to 2047, got -1"):
        model(given, places=placed._replace(elapsed=placed.elapsed - placed.elapsed.min() - 1))


def test_65536_positions_train_in_one_layer() -> None:
    config = replace(
        CONFIG, context=65536, layers=1, heads=1, width=16, stride=512, summary=16, recompute=True, **PLACED
    )
    torch.manual_seed(0)
    model = MuseNet(config)
    given, placed = tokens(1, 65537), places(1, 65537)
    before = bits_per_token(model, given, placed)
    before.backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer.step()
    with torch.no_grad():
        assert bits_per_token(model, given, placed) < before


def test_presets_are_what_they_are_called() -> None:
    config = preset("musenet", 100, dropout=0.1, layers=None)
    assert (config.layers, config.heads, config.context, config.vocabulary) == (72, 24, 4096, 100)
    assert config.dropout == 0.1
    assert all(config.width % config.heads == 0 for config in PRESETS.values())
    assert all(config.places == tuple(ROWS) for config in PRESETS.values())
    with pytest.raises(ValueError, match="tiny, small, musenet"):
        preset("huge", 100)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention", "sparse"), ("width", 50), ("stride", 40), ("context", 100), ("summary", 5), ("layers", 0),
        ("dropout", 1.0), ("heads", 2.5),
    ],
)  # fmt: skip
def test_a_shape_that_does_not_fit_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} must"):
        replace(CONFIG, **{field: value})


@pytest.mark.parametrize("shape", [(10,), (1, CONFIG.context + 1)])
def test_tokens_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^tokens must"):
        build("merged")(tokens(*shape))


@pytest.mark.parametrize("wrong", [-1, CONFIG.vocabulary])
def test_a_token_that_is_none_is_refused(wrong: int) -> None:
    given = tokens(1, 20)
    given[0, 7] = wrong
    with pytest.raises(ValueError, match=rf"^tokens\[0, 7\] must be from 0 to 59, .* got {wrong}"):
        build("merged")(given)
