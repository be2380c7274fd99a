"""BERT against transformers' own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from peers import additive, double, gradients, right_padding, shake
from torch import Tensor

from gdl_kernels import layouts
from gdl_kernels.integrations import transformers as hook
from models.bert.huggingface import _table, from_huggingface, from_state_dict, to_huggingface
from models.bert.model import Bert, BertForMaskedLM, Config

os.environ["HF_HUB_OFFLINE"] = "1"  # read as it is imported
hf = pytest.importorskip("transformers", minversion="5.24", reason="transformers 5.24 or newer is not installed")

N = 40


@pytest.fixture(autouse=True)
def _unregistered() -> Iterator[None]:
    yield
    hook.unregister()


def theirs(kind: str = "BertForMaskedLM", **changes: Any) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "max_position_embeddings": 48, "type_vocab_size": 3, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "attn_implementation": "eager",
    }  # fmt: skip
    model = getattr(hf, kind)(hf.BertConfig(**{**sizes, **changes})).eval()
    shake(model)
    return model


def inputs(padded: bool = True, n: int = N) -> dict[str, Tensor]:
    """Padding tokens inside the text too: their embedding has no gradient there."""
    tokens = torch.randint(64, (3, n))
    tokens[:, 3] = 0
    mask = right_padding(3, n) if padded else torch.ones(3, n, dtype=torch.long)
    return {"input_ids": tokens, "attention_mask": mask, "token_type_ids": torch.randint(3, (3, n))}


def as_ours(given: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = given["attention_mask"] == 0
    names = {"input_ids": "tokens", "token_type_ids": "token_types"}
    return {names[name]: tensor for name, tensor in given.items() if name in names} | {"key_padding_mask": mask}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM"])
def test_outputs_and_gradients_are_theirs(kind: str, padded: bool) -> None:
    peer = theirs(kind)
    given = inputs(padded)
    n = N if padded else 17
    given = {name: tensor[:, :n] for name, tensor in given.items()}
    models = {"ours": from_huggingface(peer), "plain": peer, "exact": double(peer)}
    models["ours64"] = from_huggingface(models["exact"])
    found, weight = {}, None
    for name, model in models.items():
        if name.startswith("ours"):
            assert isinstance(model, BertForMaskedLM if kind == "BertForMaskedLM" else Bert)
            out = model(**as_ours(given))
            out = out if kind == "BertForMaskedLM" else torch.cat([out, model.pool(out)[:, None]], 1)
        else:
            out = model(**given)
            out = out.logits if kind == "BertForMaskedLM" else torch.cat([out[0], out[1][:, None]], 1)
        weight = torch.randn_like(out, dtype=torch.float64) if weight is None else weight
        (out * weight.to(out.dtype)).sum().backward()
        taken = (
            gradients(model, _table(model))
            if name.startswith("ours")
            else {name: p.grad for name, p in model.named_parameters()}
        )
        found[name] = {"output": out, **taken}
    assert found["ours"].keys() == found["plain"].keys()
    assert found["ours"]["output"].dtype == torch.float32
    for key, ours in found["ours"].items():
        plain, exact = found["plain"][key], found["exact"][key]
        assert_accurate(ours, plain, exact, key, ulps=64, terms=found["exact"]["output"] if "key.bias" in key else None)
        torch.testing.assert_close(found["ours64"][key], exact, rtol=1e-10, atol=1e-10, msg=lambda m, key=key: key + m)
    prefix = "bert." * (kind == "BertForMaskedLM")
    padding_row = found["ours"][f"{prefix}embeddings.word_embeddings.weight"][0]
    assert (padding_row == 0).all() == (kind == "BertModel")  # there it is no output weight


def test_token_types_are_0_by_default() -> None:
    peer = theirs("BertModel")
    tokens = torch.randint(64, (2, 9))
    torch.testing.assert_close(from_huggingface(peer)(tokens), peer(tokens).last_hidden_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM", "no pooler"])
def test_there_and_back_are_the_very_same_tensors(kind: str, dtype: torch.dtype) -> None:
    without = kind == "no pooler"
    peer = hf.BertModel(theirs("BertModel").config, add_pooling_layer=False) if without else theirs(kind)
    peer = peer.to(dtype).train()
    ours = from_huggingface(peer)
    back = to_huggingface(ours)
    assert type(back) is type(peer)
    assert back.training
    assert list(back.state_dict()) == list(peer.state_dict())
    for name, tensor in peer.state_dict().items():
        assert back.state_dict()[name].dtype == dtype
        assert torch.equal(back.state_dict()[name], tensor), name
    again = from_huggingface(back)
    assert again.config == ours.config
    assert list(again.state_dict()) == list(ours.state_dict())
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())
    assert all(tensor.is_contiguous() for tensor in ours.state_dict().values())


def test_models_share_no_memory_and_their_weights_stay_tied() -> None:
    ours = BertForMaskedLM(Config(vocabulary=64, context=48, layers=1, heads=2, width=16, hidden=32))
    peer = to_huggingface(ours)
    before = peer.bert.embeddings.word_embeddings.weight[5, 0].item()
    with torch.no_grad():
        ours.bert.embeddings.word.weight[5] += 1
        ours.bert.layers[0].attention.qkv.weight += 1
    assert peer.bert.embeddings.word_embeddings.weight[5, 0].item() == before
    assert peer.cls.predictions.decoder.weight is peer.bert.embeddings.word_embeddings.weight
    assert peer.cls.predictions.decoder.bias is peer.cls.predictions.bias
    assert all(p.requires_grad for p in [*peer.parameters(), *from_huggingface(peer).parameters()])


@pytest.mark.parametrize("kind", ["BertModel", "BertForMaskedLM"])
def test_a_folder_that_save_pretrained_wrote(kind: str, tmp_path: Path) -> None:
    peer = theirs(kind)
    peer.save_pretrained(tmp_path)
    ours = from_huggingface(str(tmp_path))
    assert not ours.training
    for name, tensor in from_huggingface(peer).state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)


def test_a_state_dict_and_its_configuration() -> None:
    peer = theirs()
    ours = from_state_dict(peer.state_dict(), peer.config)
    tokens = torch.randint(64, (2, 9))
    torch.testing.assert_close(ours(tokens), peer(tokens).logits, rtol=1e-4, atol=1e-4)


PATTERNS: dict[str, dict[str, Any]] = {
    "local": {"pattern": "local", "window": 6},
    "fixed": {"pattern": "fixed", "stride": 8, "summary": 2, "heads": 4, "block_size": 16},
}


def kept(entry: dict[str, Any] | None, n: int) -> Tensor:
    """What an entry keeps, written out, bool (4, n, n)."""
    mask = torch.ones(4, n, n, dtype=torch.bool)
    for head in range(4):
        for i in range(n):
            for j in range(n):
                if entry is not None and entry["pattern"] == "local":
                    mask[head, i, j] = abs(i - j) < 6
                elif entry is not None:
                    mask[head, i, j] = i // 8 == j // 8 or 8 - (head + 1) * 2 <= j % 8 < 8 - head * 2
    return mask


@pytest.mark.parametrize("n", [N, 48, 19])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_sparse_variant_is_theirs_under_its_mask(pattern: str, n: int) -> None:
    peer, given = theirs(), inputs(n=n)
    ours = from_huggingface(peer)
    sparse = BertForMaskedLM(replace(ours.config, attention=PATTERNS[pattern])).eval()
    sparse.load_state_dict(ours.state_dict())
    mask = kept(PATTERNS[pattern], n) & given["attention_mask"][:, None, None].bool()  # [3, 4, n, n]
    expected = peer(**{**given, "attention_mask": torch.zeros(mask.shape).masked_fill(~mask, -1e30)}).logits
    seen = mask.any(-1).all(1)  # where padding hides all, they give a mean of everything
    torch.testing.assert_close(sparse(**as_ours(given))[seen], expected[seen], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours(**as_ours(given))[seen], expected[seen], atol=1e-2)


def test_a_pattern_each_layer() -> None:
    peer, given = theirs(), inputs(padded=False)
    entries = [PATTERNS["local"], None]
    masks = [additive(kept(entry, N)[:1].expand(3, N, N)) for entry in entries]
    for layer, mask in zip(peer.bert.encoder.layer, masks):
        layer.register_forward_pre_hook(lambda _, args, mask=mask: (args[0], mask, *args[2:]))
    ours = from_huggingface(peer)
    sparse = BertForMaskedLM(replace(ours.config, attention=entries)).eval()
    sparse.load_state_dict(ours.state_dict())
    torch.testing.assert_close(sparse(**as_ours(given)), peer(**given).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("entry", [PATTERNS["fixed"], [PATTERNS["local"], None]], ids=["all", "each"])
def test_patterns_go_there_and_back(entry: Any, tmp_path: Path) -> None:
    ours = BertForMaskedLM(
        Config(vocabulary=64, context=48, layers=2, heads=4, width=32, hidden=48, token_types=3, attention=entry)
    ).eval()
    shake(ours)
    peer = to_huggingface(ours)
    assert peer.config._attn_implementation == hook.NAME
    given = inputs()
    torch.testing.assert_close(peer(**given).logits, ours(**as_ours(given)), rtol=1e-4, atol=1e-4)
    peer.save_pretrained(tmp_path)
    for again in (from_huggingface(peer), from_huggingface(tmp_path)):
        assert again.config == ours.config
    peer.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attends by 'sdpa', which passes over it"):
        from_huggingface(peer)


def folder(change: Callable[[Path], object]) -> Callable[[Path], Any]:
    def call(path: Path) -> Any:
        theirs().save_pretrained(path)
        change(path)
        return from_huggingface(path)

    return call


def renamed(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "architectures": ["BertForQuestionAnswering"]}))


def headless(path: Path) -> None:
    theirs("BertModel").save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))


def state(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], Any]:
    def call(path: Path) -> Any:
        peer = theirs()
        weights = {name: tensor.clone() for name, tensor in peer.state_dict().items()}
        change(weights)
        return from_state_dict(weights, peer.config)

    return call


def configured(**changes: Any) -> Callable[[Path], Any]:
    return lambda path: from_huggingface(theirs(**changes))


def with_option(name: str, value: Any) -> Callable[[Path], Any]:
    def call(path: Path) -> Any:
        peer = theirs()
        setattr(peer.config, name, value)
        return from_huggingface(peer)

    return call


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "activation": (configured(hidden_act="relu"), "hidden_act must be 'gelu', got 'relu'"),
    "positions": (with_option("position_embedding_type", "relative_key"), "position_embedding_type must be 'absolute'"),
    "decoder": (configured(is_decoder=True), "is_decoder must be False, got True"),
    "cross": (configured(is_decoder=True, add_cross_attention=True), "(is_decoder|add_cross_attention) must be False"),
    "untied": (configured(tie_word_embeddings=False), "tie_word_embeddings must be True, got False"),
    "kind": (lambda path: from_huggingface(hf.GPT2Model(hf.GPT2Config(n_layer=1, n_embd=12))), "model_type must be "
             "'bert', got 'gpt2'"),
    "head": (configured(kind="BertForSequenceClassification"), "missing are embeddings.* foreign are bert.embe"),
    "next sentence": (configured(kind="BertForPreTraining"), "foreign are bert.pooler.dense.bias, bert.pooler.dense."
                      "weight, cls.seq_relationship.bias$"),
    "layout": (with_option("gdl_layout", PATTERNS["local"]), "attends by 'eager', which passes over it"),
    "tied": (state(lambda s: s["cls.predictions.decoder.weight"].add_(1)), "decoder.weight must be tied to bert"),
    "missing": (state(lambda s: s.pop("bert.encoder.layer.1.output.dense.bias")), "missing are bert.encoder.layer.1.out"
                "put.dense.bias$"),
    "shape": (state(lambda s: s.update({"cls.predictions.transform.dense.bias": torch.zeros(9)})), "transform.bias must"
              r" have the shape that the configuration says, \(32,\), got \(9,\)"),
    "no folder": (lambda path: from_huggingface(path / "no"), "no: must be a folder that save_pretrained wrote"),
    "class": (folder(renamed), "must name one of BertModel, BertForMaskedLM, got 'BertForQuestionAnswering'"),
    "half": (folder(headless), "the weights cls.predictions.* are missing"),
    "damaged": (folder(lambda path: (path / "model.safetensors").write_bytes(b"no")), "not a whole model"),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_ours_is_refused_by_name(reason: str, tmp_path: Path) -> None:
    call, message = REFUSED[reason]
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


def test_something_else_is_no_source() -> None:
    with pytest.raises(TypeError, match="source must be a model of transformers or a folder, got Linear"):
        from_huggingface(torch.nn.Linear(2, 2))


def test_the_layouts_are_those_of_the_length() -> None:
    config = Config(vocabulary=64, context=48, layers=2, heads=4, width=32, hidden=48, attention=PATTERNS["local"])
    first, second = config.layouts(20)
    assert first is second is config.layouts(20)[0]
    assert torch.equal(first.to_mask(), layouts.local(20, 6, causal=False).to_mask())
