"""The hook into Hugging Face transformers, against its own eager attention. Tiny models, random weights, no network."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accuracy import assert_accurate
from torch import Tensor

from gdl_kernels import layouts
from gdl_kernels.integrations import transformers as hook
from gdl_kernels.layouts import _named

os.environ["HF_HUB_OFFLINE"] = "1"  # read as it is imported
hf = pytest.importorskip("transformers", minversion="5.24", reason="transformers 5.24 or newer is not installed")

N = 40
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_named, "_registered", {})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models as small as these are slower on several
    hook.register()
    yield
    hook.unregister()
    _named._built.cache_clear()
    torch.set_num_threads(threads)


def gpt2(**changes: Any) -> Any:
    no_dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    sizes = {"vocab_size": 64, "n_positions": 96, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return hf.GPT2LMHeadModel, hf.GPT2Config(**{**sizes, **no_dropout, **changes})


def bert(**changes: Any) -> Any:
    no_dropout = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    return hf.BertForMaskedLM, hf.BertConfig(**{**SIZES, **no_dropout, **changes})


def llama(**changes: Any) -> Any:
    """Four heads on two key heads."""
    return hf.LlamaForCausalLM, hf.LlamaConfig(**{**SIZES, "num_key_value_heads": 2, **changes})


def mistral(**changes: Any) -> Any:
    sizes = {**SIZES, "num_key_value_heads": 2, "sliding_window": 7}
    return hf.MistralForCausalLM, hf.MistralConfig(**{**sizes, **changes})


def gemma3(**changes: Any) -> Any:
    """One layer with a window and one without."""
    types = ["sliding_attention", "full_attention"]
    sizes = {**SIZES, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 7, "layer_types": types}
    return hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**{**sizes, **changes})


MODELS = {"gpt2": gpt2, "bert": bert, "llama": llama, "mistral": mistral, "gemma3": gemma3}
DECODERS = {name: model for name, model in MODELS.items() if name != "bert"}


def pair(make: Callable[..., Any], **changes: Any) -> tuple[Any, Any]:
    """A model on our attention, and the same weights on eager attention."""
    kind, config = make(pad_token_id=0, bos_token_id=1, eos_token_id=None, **changes)
    config._attn_implementation = hook.NAME
    ours = kind(config).eval()
    with torch.no_grad():
        for parameter in ours.parameters():  # drawn as small as they are, attention would be nearly uniform
            if parameter.dim() > 1:
                parameter.mul_(4)
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    theirs = kind(config).eval()
    theirs.load_state_dict(ours.state_dict())
    assert ours.config._attn_implementation == hook.NAME
    return ours, theirs


def tokens(batch: int = 3, n: int = N) -> Tensor:
    return torch.randint(2, 64, (batch, n))


def padded(side: str, batch: int = 3, n: int = N) -> Tensor:
    """int64 (batch, n), 0 for padding; the first sequence has none."""
    length = torch.tensor([n, n - 5, n // 3])[:batch, None]
    place = torch.arange(n)
    return (place < length if side == "right" else place >= n - length).long()


def logits(model: Any, mask: Tensor | None, **inputs: Any) -> Tensor:
    """Of what is no padding: the rest, of rows that see nothing or mean nothing, is anybody's."""
    found = model(attention_mask=mask, **inputs).logits
    return found if mask is None else found[mask.bool()]


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_without_a_layout_it_is_eager_attention(name: str, side: str | None) -> None:
    ours, theirs = pair(MODELS[name])
    ids, mask = tokens(), None if side is None else padded(side)
    plain = logits(theirs, mask, input_ids=ids)
    found = logits(ours, mask, input_ids=ids)
    exact_model = copy.deepcopy(theirs).double()
    exact_model.set_attn_implementation("sdpa")  # eager attention's mask overflows in float64: its padding is NaN
    assert_accurate(found, plain, logits(exact_model, mask, input_ids=ids), ulps=16)
    # A wrong mask shows.
    other = logits(theirs, padded("right" if side is None else side, n=N).roll(1, 1), input_ids=ids)
    assert other.shape != found.shape or not torch.allclose(other, found, atol=1e-2)
    weight = torch.randn_like(found)
    gradients = {}
    for key, model, w in (("ours", ours, weight), ("plain", theirs, weight), ("exact", exact_model, weight.double())):
        (logits(model, mask, input_ids=ids) * w).sum().backward()
        gradients[key] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients["ours"].keys() == gradients["plain"].keys()
    for parameter, gradient in gradients["ours"].items():
        plain, exact = gradients["plain"][parameter], gradients["exact"][parameter]
        assert_accurate(gradient, plain, exact, parameter, ulps=64, terms=weight)


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_generates_eager_attentions_tokens(name: str, side: str | None, cache: str | None) -> None:
    ours, theirs = pair(DECODERS[name])
    ids = tokens(n=18)
    mask = torch.ones_like(ids) if side is None else padded(side, n=18)
    how = {"use_cache": cache is not None, "cache_implementation": cache if cache == "static" else None}
    how = {"max_new_tokens": 14, "do_sample": False, "attention_mask": mask, **how}
    expected = theirs.generate(ids, **how)
    assert expected.shape == (3, 32)
    assert len(expected[:, 18:].unique()) > 2
    assert torch.equal(ours.generate(ids, **how), expected)


PATTERNS: dict[str, dict[str, Any]] = {
    "local": {"window": 6},
    "strided": {"stride": 5},
    "fixed": {"stride": 8, "summary": 2, "block_size": 16},
    "sliding_with_sinks": {"window": 5, "sinks": 3},
}


def as_mask(entry: dict[str, Any], n: int, causal: bool) -> Tensor:
    """What an entry keeps, bool (n, n)."""
    arguments = {key: value for key, value in entry.items() if key != "pattern"}
    if entry["pattern"] == "sliding_with_sinks":
        return layouts.sliding_with_sinks(n, **arguments).to_mask()
    return getattr(layouts, entry["pattern"])(n, causal=causal, **arguments).to_mask()


def additive(kept: Tensor) -> Tensor:
    """A mask of our own for eager attention, which takes one of four dimensions as it is: float (B, 1, n, n)."""
    return torch.zeros(kept.shape).masked_fill(~kept, torch.finfo(torch.float32).min)[:, None]


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "mistral"])
def test_a_layout_is_its_mask(name: str, pattern: str, side: str | None) -> None:
    """And its first position is the first token of each sequence, not the first place of a padded batch."""
    if name == "bert" and pattern == "sliding_with_sinks":
        pytest.skip("the pattern is causal and the model is not; the error has a test of its own")
    entry = {"pattern": pattern, **PATTERNS[pattern]}
    ours, theirs = pair(MODELS[name], gdl_layout=entry)
    ids, mask = tokens(), torch.ones(3, N, dtype=torch.long) if side is None else padded(side)
    kept = as_mask(entry, N, causal=name != "bert").expand(3, N, N).clone()
    if name == "mistral":
        kept &= layouts.local(N, 7).to_mask()
    places = torch.arange(N).expand(3, N).clone()
    if side == "left":
        for i, pad in enumerate(N - mask.sum(1)):
            kept[i, pad:, pad:] = kept[i, : N - pad, : N - pad].clone()
            places[i] = (places[i] - pad).clamp(min=0)
    kept &= mask[:, None].bool()
    plain = theirs(ids, attention_mask=additive(kept), position_ids=places).logits[mask.bool()]
    found = logits(ours, mask if side else None, input_ids=ids, position_ids=places if side else None)
    found = found if side else found.flatten(0, 1)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_padded_batch_generates_what_each_sequence_does_alone(name: str, pattern: str, cache: str | None) -> None:
    ours, _ = pair(MODELS[name], gdl_layout={"pattern": pattern, **PATTERNS[pattern]})
    ids, mask = tokens(n=18), padded("left", n=18)
    how: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "use_cache": cache is not None}
    how["cache_implementation"] = cache if cache == "static" else None
    together = ours.generate(ids, attention_mask=mask, **how)
    for i in range(3):
        one = ids[i : i + 1, 18 - mask[i].sum() :]
        alone = ours.generate(one, attention_mask=torch.ones_like(one), **{**how, "use_cache": False})
        assert torch.equal(together[i, 18:], alone[0, one.shape[1] :])


def test_a_layer_each() -> None:
    entries = [{"pattern": "local", "window": 4}, None]
    ours, _ = pair(gpt2, gdl_layout=entries)
    ids = tokens()
    seen: list[Tensor] = []
    attend = hook.attend

    def spy(module: Any, *args: Any, **kwargs: Any) -> Any:
        out = attend(module, *args, **kwargs)
        seen.append(hook._layout_of(hook._entry(module), args[3].seen, args[0], args[1]).to_mask()[:N, :N])
        return out

    hf.AttentionInterface.register(hook.NAME, spy)
    ours(ids)
    assert torch.equal(seen[0], layouts.local(N, 4).to_mask())
    assert torch.equal(seen[1], layouts.causal(N).to_mask())


def test_registered_pattern_and_its_layouts_are_kept() -> None:
    calls = []

    def merged(n: int, *, causal: bool, stride: int) -> layouts.Layout:
        calls.append(n)
        return layouts.local(n, stride, causal=causal) | layouts.strided(n, stride, causal=causal)

    hook.register_pattern("merged", merged)
    ours, theirs = pair(llama, gdl_layout={"pattern": "merged", "stride": 6})
    for n in (17, N, N, 30):
        ids = tokens(n=n)
        kept = (layouts.local(n, 6) | layouts.strided(n, 6)).to_mask().expand(3, n, n)
        expected = theirs(ids, attention_mask=additive(kept)).logits
        torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-4, atol=1e-4)
    ours.generate(tokens(n=5), max_new_tokens=9, do_sample=False)
    assert calls == [hook._SHORTEST]
    hook.register_pattern("merged", lambda n, causal, stride: layouts.causal(n))
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_causal_layouts_grow_by_doubling() -> None:
    sizes = set()
    for n in (1, 100, 257, 400, 512, 513):
        seen = hook._Seen(causal=True, window=None, n_k=n, start=0)
        x = torch.empty(1, 1, n, 4)
        sizes.add(hook._layout_of(None, seen, x, x).n_k)
    assert sizes == {256, 512, 1024}


def test_trains_and_recomputes() -> None:
    """Gradient checkpointing hands the mask on too. The loss of Adam's steps is eager attention's."""
    losses = []
    for model in pair(llama):
        model.train()
        model.activation_checkpointing_enable()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        torch.manual_seed(1)
        ids, mask = tokens(), padded("right")
        labels = ids.masked_fill(mask == 0, -100)
        losses.append([])
        for _ in range(5):
            loss = model(ids, attention_mask=mask, labels=labels, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
    ours, theirs = map(torch.stack, losses)
    assert ours[-1] < ours[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "entry"), [("gpt2", None), ("gpt2", {"pattern": "local", "window": 9}), ("bert", None), ("mistral", None)]
)
def test_trains_on_layouts_that_inference_mode_has_built(name: str, entry: Any) -> None:
    for cache in (_named._dense, _named._built, hook._full, hook._windowed):
        cache.cache_clear()
    model, _ = pair(MODELS[name], gdl_layout=entry)
    ids = tokens()
    with torch.inference_mode():
        model(input_ids=ids)
    model(input_ids=ids).logits.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "attn" in n)


def test_dropout_is_that_of_the_config_in_training_only() -> None:
    ours, _ = pair(gpt2, attn_pdrop=0.5)
    ids = tokens()
    assert torch.equal(ours(ids).logits, ours(ids).logits)
    ours.train()
    assert not torch.equal(ours(ids).logits, ours(ids).logits)
    torch.manual_seed(3)
    first = ours(ids).logits
    torch.manual_seed(3)
    assert torch.equal(ours(ids).logits, first)


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_autocast(name: str) -> None:
    ours, theirs = pair(MODELS[name])
    ids, mask = tokens(), padded("left")
    exact = logits(ours, mask, input_ids=ids).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, plain = (logits(model, mask, input_ids=ids) for model in (ours, theirs))
    assert_accurate(found, plain, exact, ulps=4)
    found.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)


def test_two_sequences_attend_to_each_other_as_with_eager_attention() -> None:
    """An encoder and its decoder: full, padded; causal; and one on the other. Greedy search and beams."""
    sizes = {
        "vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 96,
    }  # fmt: skip

    def bart(**changes: Any) -> Any:
        return hf.BartForConditionalGeneration, hf.BartConfig(**{**sizes, **changes})

    ours, theirs = pair(bart)
    ids, mask, target = tokens(), padded("right"), tokens(n=11)
    found, expected = (m(ids, attention_mask=mask, decoder_input_ids=target).logits for m in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for beams in (1, 3):
        how = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "num_beams": beams}
        assert torch.equal(ours.generate(ids, **how), theirs.generate(ids, **how))
    ours.config.gdl_layout = {"pattern": "local", "window": 6}
    with pytest.raises(ValueError, match="this model attends to another sequence besides"):
        ours(ids, decoder_input_ids=target)


def test_a_model_that_makes_no_mask_and_one_whose_window_looks_both_ways() -> None:
    def vit(**changes: Any) -> Any:
        sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
        return hf.ViTModel, hf.ViTConfig(**sizes, image_size=32, patch_size=8)

    def modernbert(**changes: Any) -> Any:
        sizes = {**SIZES, "local_attention": 8, "num_hidden_layers": 4, "cls_token_id": 1, "sep_token_id": 2}
        return hf.ModernBertModel, hf.ModernBertConfig(**{**sizes, **changes, "eos_token_id": 2})

    ours, theirs = pair(vit)
    images = torch.randn(2, 3, 32, 32)
    found, expected = (model(images).last_hidden_state for model in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    ours, theirs = pair(modernbert)
    ids, mask = tokens(), padded("right")
    found, expected = (m(ids, attention_mask=mask).last_hidden_state[mask.bool()] for m in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_chunks_of_a_prompt(name: str) -> None:
    ours, theirs = pair(MODELS[name])
    ids = tokens()
    cache = hf.DynamicCache(config=ours.config)
    parts = [ours(part, cache=cache).logits for part in ids.split((13, 1, 20, 6), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_an_empty_sequence_sees_nothing() -> None:
    ours, _ = pair(gpt2, gdl_layout={"pattern": "fixed", "stride": 8, "summary": 2})
    mask = padded("left")
    mask[1] = 0
    out = ours(tokens(), attention_mask=mask, labels=tokens())
    out.loss.backward()
    assert out.logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in ours.parameters())


def test_a_sliding_cache_and_a_pattern_that_counts_from_the_first() -> None:
    ours, _ = pair(mistral, gdl_layout={"pattern": "fixed", "stride": 8, "summary": 2})
    ids = tokens(n=5)
    how = {"max_new_tokens": 14, "do_sample": False}
    with pytest.raises(ValueError, match="has dropped this layer's first 1 keys, and the pattern 'fixed' counts"):
        ours.generate(ids, **how)
    kept = ours.generate(ids, cache=hf.DynamicCache(), **how)
    assert torch.equal(kept, ours.generate(ids, use_cache=False, **how))


def test_the_config_keeps_its_layout(tmp_path: Any) -> None:
    entry = [{"pattern": "local", "window": 6}, {"pattern": "fixed", "stride": 8, "summary": 2}]
    ours, _ = pair(gpt2, gdl_layout=entry)
    ours.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=hook.NAME).eval()
    assert again.config.gdl_layout == entry
    ids = tokens()
    assert torch.equal(again(ids).logits, ours(ids).logits)


def bad_layout(entry: Any, name: str = "gpt2") -> Callable[[], Any]:
    return lambda: pair(MODELS[name], gdl_layout=entry)[0](tokens())


def with_inputs(name: str, **inputs: Any) -> Callable[[], Any]:
    return lambda: pair(MODELS[name])[0](tokens(), **inputs)


def registered(build: Callable[..., Any]) -> Callable[[], Any]:
    def call() -> Any:
        hook.register_pattern("mine", build)
        return bad_layout({"pattern": "mine"})()

    return call


ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "pattern": (bad_layout({"pattern": "diagonal"}), "must be .*one of local, strided, fixed, sliding_with_sinks, .*"
                "got {'pattern': 'diagonal'}"),
    "entry": (bad_layout("local"), "gdl_layout must be .* got 'local'"),
    "causal": (bad_layout({"pattern": "local", "window": 3, "causal": False}), "must not say 'causal'"),
    "layers": (bad_layout([None]), "gdl_layout has 1 entries, and there is none for layer 1"),
    "argument": (bad_layout({"pattern": "local", "window": 0}), "window must be at least 1, got 0"),
    "sinks": (bad_layout({"pattern": "sliding_with_sinks", "window": 5, "sinks": 1}, "bert"), "causal, and this model"),
    "future": (registered(lambda n, causal: layouts.full(n)), "'mine' sees later positions"),
    "length": (registered(lambda n, causal: layouts.causal(n + 1)), "'mine' must give a layout of 256 positions"),
    "4-D": (with_inputs("gpt2", attention_mask=torch.zeros(3, 1, N, N)), r"one of shape \(3, 1, 40, 40\): use"),
    "3-D": (with_inputs("llama", attention_mask=torch.ones(3, N, N)), "attention_mask must be .*positions"),
    "packed": (with_inputs("llama", position_ids=torch.arange(N)[None] % 20, use_cache=False), "packed sequences"),
    "heads": (with_inputs("llama", head_mask=torch.ones(4)), "has no head_mask, a mask of heads: use"),
    "weights": (with_inputs("bert", output_attentions=True), "has no output_attentions, attention weights, which"),
    "own name": (lambda: hook.register_pattern("local", layouts.local), "must not be a pattern of gdl_kernels"),
}  # fmt: skip


@pytest.mark.parametrize("error", ERRORS)
def test_errors(error: str) -> None:
    call, message = ERRORS[error]
    with pytest.raises(ValueError, match=message):
        call()


def test_types() -> None:
    with pytest.raises(TypeError, match="name must be a string, got int"):
        hook.register_pattern(3, layouts.local)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="build must be callable, got str"):
        hook.register_pattern("mine", "local")  # type: ignore[arg-type]


def test_a_capped_score_is_refused() -> None:
    config = hf.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, attn_implementation=hook.NAME)
    with pytest.raises(ValueError, match="has no softcap, a cap of the scores"):
        hf.Gemma2ForCausalLM(config)(tokens())


def test_a_mask_has_no_values() -> None:
    mask = hook.visible_keys(2, 5, 5, attention_mask=padded("left", 2, 5))
    assert mask.shape == (2, 1, 5, 5)
    for moved in (mask.to("cpu"), mask.contiguous(), mask.detach(), mask.clone()):
        assert moved.seen.causal
        assert torch.equal(moved.seen.padding, padded("left", 2, 5) == 0)
    assert "causal=True" in repr(mask)
    for use in (lambda: mask + 1.0, lambda: mask[:, :, 1:], lambda: torch.where(mask, 1, 0)):
        with pytest.raises(NotImplementedError, match=r"calls .* on it: use attn_implementation='sdpa'"):
            use()


def test_a_compiled_model_is_refused() -> None:
    ours, _ = pair(llama)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match=r"or torch\.compile, calls _"):
        torch.compile(ours, backend="eager")(tokens())


def test_unregister() -> None:
    hook.register()
    hook.unregister()
    hook.unregister()
    assert hook.NAME not in hf.AttentionInterface().valid_keys()
    assert hook.NAME not in hf.AttentionMaskInterface().valid_keys()
    kind, config = gpt2()
    config._attn_implementation = hook.NAME
    with pytest.raises(ValueError, match=hook.NAME):
        kind(config)


@pytest.mark.parametrize("version", ["4.57.1", "5.0.0", "6.0.0"])
def test_other_versions(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    message = f"found transformers {version}; .*pip install 'transformers>=5.24,<6'"
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["transformers"], "__version__", version)
        with pytest.raises(ImportError, match=message):
            hook.register()


def test_gdl_kernels_does_not_import_it_and_says_what_to_install() -> None:
    program = """
import sys
sys.modules["transformers"] = None
import gdl_kernels, gdl_kernels.integrations
assert "gdl_kernels.integrations.transformers" not in sys.modules
from gdl_kernels.integrations import transformers
try:
    transformers.register()
except ImportError as error:
    assert "pip install 'transformers>=5.24,<6'" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", program], check=True)
