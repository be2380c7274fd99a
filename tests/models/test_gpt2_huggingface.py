"""GPT-2 against transformers' own."""

from __future__ import annotations

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

from gdl_kernels.integrations import transformers as hook
from models.gpt2.huggingface import _table, from_huggingface, from_state_dict, to_huggingface
from models.gpt2.model import GPT2, Config

os.environ["HF_HUB_OFFLINE"] = "1"  # read as it is imported
hf = pytest.importorskip("transformers", minversion="5.24", reason="transformers 5.24 or newer is not installed")

N = 40


@pytest.fixture(autouse=True)
def _unregistered() -> Iterator[None]:
    yield
    hook.unregister()


def theirs(kind: str = "GPT2LMHeadModel", **changes: Any) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 64, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 56, "attn_pdrop": 0.0,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_implementation": "eager",
    }  # fmt: skip
    ends = {"bos_token_id": None, "eos_token_id": None}
    model = getattr(hf, kind)(hf.GPT2Config(**{**sizes, **ends, **changes})).eval()
    shake(model)
    return model


def tokens(n: int = N) -> Tensor:
    return torch.randint(64, (3, n))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["GPT2Model", "GPT2LMHeadModel"])
def test_outputs_and_gradients_are_theirs(kind: str, padded: bool) -> None:
    peer, given = theirs(kind), tokens(N if padded else 17)
    mask = right_padding(3, N) if padded else None
    models = {"ours": from_huggingface(peer), "plain": peer, "exact": double(peer)}
    models["ours64"] = from_huggingface(models["exact"])
    found, weight = {}, None
    for name, model in models.items():
        if name.startswith("ours"):
            padding = None if mask is None else mask == 0
            out = (model if kind == "GPT2LMHeadModel" else model.hidden)(given, key_padding_mask=padding)
        else:
            out = model(given, attention_mask=mask)[0]
        weight = torch.randn_like(out, dtype=torch.float64) if weight is None else weight
        (out * weight.to(out.dtype)).sum().backward()
        if name.startswith("ours"):
            taken = gradients(model, _table(model))
        else:
            taken = {name.removeprefix("transformer."): p.grad for name, p in model.named_parameters()}
        found[name] = {"output": out, **taken}
    assert found["ours"].keys() == found["plain"].keys()
    assert found["ours"]["output"].dtype == torch.float32
    for key, ours in found["ours"].items():
        plain, exact = found["plain"][key], found["exact"][key]
        assert_accurate(ours, plain, exact, key, ulps=64)
        torch.testing.assert_close(found["ours64"][key], exact, rtol=1e-10, atol=1e-10, msg=lambda m, key=key: key + m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["GPT2Model", "GPT2LMHeadModel"])
def test_there_and_back_are_the_very_same_tensors(kind: str, dtype: torch.dtype) -> None:
    peer = theirs(kind).to(dtype).train()
    ours = from_huggingface(peer)
    back = to_huggingface(ours, head=kind == "GPT2LMHeadModel")
    assert type(back) is type(peer)
    assert back.training
    assert list(back.state_dict()) == list(peer.state_dict())
    for name, tensor in peer.state_dict().items():
        assert back.state_dict()[name].dtype == dtype
        assert torch.equal(back.state_dict()[name], tensor), name
    again = from_huggingface(back)
    assert again.config == ours.config
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())
    assert all(tensor.is_contiguous() for tensor in [*ours.state_dict().values(), *back.state_dict().values()])


def test_models_share_no_memory_and_the_head_stays_tied() -> None:
    ours = GPT2(Config(vocabulary=64, context=48, layers=1, heads=2, width=16, hidden=32))
    peer = to_huggingface(ours)
    before = peer.transformer.wte.weight[5, 0].item()
    with torch.no_grad():
        ours.embedding.weight[5] += 1
        ours.position.weight[5] += 1
    assert peer.transformer.wte.weight[5, 0].item() == before
    assert peer.lm_head.weight is peer.transformer.wte.weight
    assert all(p.requires_grad for p in [*peer.parameters(), *from_huggingface(peer).parameters()])


def test_the_published_end_of_text_stays() -> None:
    ours = GPT2(Config(layers=1, heads=1, width=8, hidden=8))
    assert to_huggingface(ours).config.eos_token_id == 50_256
    assert to_huggingface(GPT2(replace(ours.config, vocabulary=99))).config.eos_token_id is None


@pytest.mark.parametrize("kind", ["GPT2Model", "GPT2LMHeadModel"])
def test_a_folder_that_save_pretrained_wrote(kind: str, tmp_path: Path) -> None:
    peer = theirs(kind)
    peer.save_pretrained(tmp_path)
    ours = from_huggingface(str(tmp_path))
    assert not ours.training
    for name, tensor in from_huggingface(peer).state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)


def test_a_cache_gives_their_caches_logits() -> None:
    peer, given = theirs(), tokens()
    ours = from_huggingface(peer)
    with torch.no_grad():
        cache = ours.cache(batch=3)
        found = [ours(part, cache=cache) for part in given.split((13, 1, 20, 6), 1)]
        first = peer(given[:, :13], use_cache=True)
        second = peer(given[:, 13:], cache=first.cache)
    expected = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-4, atol=1e-4)


PATTERNS: dict[str, dict[str, Any]] = {
    "local": {"pattern": "local", "window": 6},
    "fixed": {"pattern": "fixed", "stride": 8, "summary": 2, "heads": 4, "block_size": 16},
}


def kept(entry: dict[str, Any] | None, n: int) -> Tensor:
    """What an entry keeps, written out, bool (4, n, n)."""
    mask = torch.zeros(4, n, n, dtype=torch.bool)
    for head in range(4):
        for i in range(n):
            for j in range(i + 1):
                if entry is None:
                    mask[head, i, j] = True
                elif entry["pattern"] == "local":
                    mask[head, i, j] = i - j < 6
                else:
                    mask[head, i, j] = i // 8 == j // 8 or 8 - (head + 1) * 2 <= j % 8 < 8 - head * 2
    return mask


@pytest.mark.parametrize("n", [N, 48, 19])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_sparse_variant_is_theirs_under_its_mask(pattern: str, n: int) -> None:
    peer, given = theirs(), tokens(n)
    ours = from_huggingface(peer)
    sparse = GPT2(replace(ours.config, attention=PATTERNS[pattern])).eval()
    sparse.load_state_dict(ours.state_dict())
    mask = torch.zeros(3, 4, n, n).masked_fill(~kept(PATTERNS[pattern], n), -1e30)
    expected = peer(given, attention_mask=mask).logits
    torch.testing.assert_close(sparse(given), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours(given), expected, atol=1e-2)


def test_a_pattern_each_layer() -> None:
    peer, given = theirs(), tokens()
    entries = [PATTERNS["local"], None]
    masks = [additive(kept(entry, N)[:1].expand(3, N, N)) for entry in entries]
    for block, mask in zip(peer.transformer.h, masks):
        block.register_forward_pre_hook(lambda _, args, mask=mask: (*args[:2], mask, *args[3:]))
    ours = from_huggingface(peer)
    sparse = GPT2(replace(ours.config, attention=entries)).eval()
    sparse.load_state_dict(ours.state_dict())
    torch.testing.assert_close(sparse(given), peer(given).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("entry", [PATTERNS["fixed"], [PATTERNS["local"], None]], ids=["all", "each"])
def test_patterns_go_there_and_back(entry: Any, tmp_path: Path) -> None:
    ours = GPT2(Config(vocabulary=64, context=48, layers=2, heads=4, width=32, hidden=56, attention=entry)).eval()
    shake(ours)
    peer = to_huggingface(ours)
    assert peer.config._attn_implementation == hook.NAME
    given = tokens()
    torch.testing.assert_close(peer(given).logits, ours(given), rtol=1e-4, atol=1e-4)
    peer.save_pretrained(tmp_path)
    for again in (from_huggingface(peer), from_huggingface(tmp_path)):
        assert again.config == ours.config
    peer.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attends by 'sdpa', which passes over it"):
        from_huggingface(peer)


def state(change: Callable[[dict[str, Tensor]], object]) -> Callable[[], Any]:
    def call() -> Any:
        peer = theirs()
        weights = {name: tensor.clone() for name, tensor in peer.state_dict().items()}
        change(weights)
        return from_state_dict(weights, peer.config)

    return call


def configured(**changes: Any) -> Callable[[], Any]:
    return lambda: from_huggingface(theirs(**changes))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "activation": (configured(activation_function="relu"), "activation_function must be 'gelu_new', got 'relu'"),
    "scale": (configured(scale_attn_weights=False), "scale_attn_weights must be True, got False"),
    "layers' scale": (configured(scale_attn_by_inverse_layer_idx=True), "_attn_by_inverse_layer_idx must be False"),
    "upcast": (configured(reorder_and_upcast_attn=True), "reorder_and_upcast_attn must be False, got True"),
    "cross": (configured(add_cross_attention=True), "add_cross_attention must be False, got True"),
    "untied": (configured(tie_word_embeddings=False), "tie_word_embeddings must be True, got False"),
    "dropout": (configured(embd_pdrop=0.1), "embd_pdrop must be its resid_pdrop, 0.0, got 0.1"),
    "kind": (lambda: from_huggingface(hf.BertModel(hf.BertConfig(num_hidden_layers=1))), "model_type must be 'gpt2', "
             "got 'bert'"),
    "head": (configured(kind="GPT2ForSequenceClassification"), "foreign are score.weight"),
    "tied": (state(lambda s: s["lm_head.weight"].add_(1)), "lm_head.weight must be tied to transformer.wte.weight"),
    "missing": (state(lambda s: s.pop("transformer.ln_f.bias")), "missing are ln_f.bias$"),
    "shape": (state(lambda s: s.update({"transformer.h.1.mlp.c_fc.weight": torch.zeros(56, 32)})), "blocks.1.mlp.0.weig"
              r"ht must have the shape that the configuration says, \(56, 32\), got \(32, 56\)"),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_ours_is_refused_by_name(reason: str) -> None:
    call, message = REFUSED[reason]
    with pytest.raises(ValueError, match=message):
        call()
