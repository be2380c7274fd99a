"""SparseSelfAttention, against torch's own attention and against itself."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import gdl_kernels
from gdl_kernels import layouts
from gdl_kernels.layouts import Layout
from gdl_kernels.nn import SparseSelfAttention
from gdl_kernels.nn.sparse_self_attention import on_device

N = 70


@pytest.fixture(autouse=True)
def _surroundings() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers as small as these are slower on several
    yield
    torch.set_num_threads(threads)


def build(layout: Layout | None = None, **changes: Any) -> SparseSelfAttention:
    layout = layouts.local(N, 20, block_size=16) if layout is None else layout
    attention = SparseSelfAttention(48, 6, layout, **{"dtype": torch.float64, **changes})
    for parameter in attention.parameters():  # biases start at 0, which would hide mistakes in them
        nn.init.normal_(parameter, std=0.3)
    return attention.eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_is_torchs_own_attention(backend: str, bias: bool) -> None:
    mask = torch.rand(6, N, N) < 0.3
    padding = torch.rand(3, N) < 0.2
    mask[:, :, 0], padding[:, 0] = True, False  # torch's gives NaN for a row that keeps nothing
    ours = build(layouts.from_mask(mask, block_size=16), backend=backend, bias=bias)
    theirs = nn.MultiheadAttention(48, 6, bias=bias, batch_first=True, dtype=torch.float64)
    names = {"qkv.weight": "in_proj_weight", "qkv.bias": "in_proj_bias"}
    weights = {names.get(name, name.replace("out", "out_proj")): w for name, w in ours.state_dict().items()}
    theirs.load_state_dict(weights)
    x = torch.randn(3, N, 48, dtype=torch.float64, requires_grad=True)
    expected, _ = theirs(x, x, x, attn_mask=~mask.repeat(3, 1, 1), key_padding_mask=padding, need_weights=False)
    found = ours(x, key_padding_mask=padding)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    gradients = torch.autograd.grad(found, [x, *ours.parameters()], weight)
    by_name = dict(theirs.named_parameters())
    expected_gradients = torch.autograd.grad(expected, [x, *(by_name[name] for name in weights)], weight)
    for name, a, b in zip(["x", *weights], gradients, expected_gradients):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_grouped_heads_are_repeated_heads() -> None:
    grouped = build(num_kv_heads=2, head_dim=12)
    assert grouped.qkv.weight.shape == ((6 + 2 + 2) * 12, 48)
    full = build(head_dim=12)
    with torch.no_grad():
        for wide, narrow in ((full.qkv.weight, grouped.qkv.weight), (full.qkv.bias, grouped.qkv.bias)):
            query, key, value = narrow.unflatten(0, (-1, 12)).split((6, 2, 2))
            repeated = [query, key.repeat_interleave(3, 0), value.repeat_interleave(3, 0)]
            wide.copy_(torch.cat(repeated).flatten(0, 1))
        full.out.load_state_dict(grouped.out.state_dict())
        x = torch.randn(2, N, 48, dtype=torch.float64)
        torch.testing.assert_close(grouped(x), full(x))


def test_initialisation_is_torchs() -> None:
    """Xavier-uniform over the fused weight, and no biases: the same distribution as torch.nn.MultiheadAttention."""
    ours = SparseSelfAttention(256, 4, layouts.causal(16))
    theirs = nn.MultiheadAttention(256, 4)
    for a, b in ((ours.qkv.weight, theirs.in_proj_weight), (ours.out.weight, theirs.out_proj.weight)):
        assert a.abs().max().item() == pytest.approx(b.abs().max().item(), rel=0.01)  # the bounds of uniform draws
        assert a.std().item() == pytest.approx(b.std().item(), rel=0.02)
    assert not ours.qkv.bias.any()
    assert not ours.out.bias.any()


PATTERNS = {
    "local": lambda: layouts.local(N, 20, block_size=16),
    "strided": lambda: layouts.strided(N, 7, block_size=16),
    "a head each": lambda: layouts.fixed(N, 16, 4, heads=3, block_size=16),
    "causal": lambda: layouts.causal(N, block_size=32),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("chunks", [[1] * N, [33, 1, 1, 20, 15]], ids=["one by one", "in chunks"])
def test_cached_decoding_is_the_whole(pattern: str, chunks: list[int]) -> None:
    attention = SparseSelfAttention(48, 3, PATTERNS[pattern](), num_kv_heads=1, dtype=torch.float64)
    x = torch.randn(2, N, 48, dtype=torch.float64)
    padding = torch.rand(2, N) < 0.2
    cache = attention.cache(batch=2)
    with torch.no_grad():
        whole, parts, end = attention(x, key_padding_mask=padding), [], 0
        for count in chunks:
            start, end = end, end + count
            parts.append(attention(x[:, start:end], key_padding_mask=padding[:, :end], cache=cache))
    assert cache.length == N
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_decoding_reads_what_its_row_keeps_and_copies_nothing() -> None:
    """Blocks that the row does not keep hold NaN: a product with one would show."""
    attention = build()
    x = torch.randn(1, N, 48, dtype=torch.float64)
    with torch.no_grad():
        whole, cache = attention(x), attention.cache()
        attention(x[:, :-1], cache=cache)
        cache.keys[:, :, :32] = torch.nan  # the last block of rows, 64 to 69, keeps keys 45 to 69
        cache.values[:, :, :32] = torch.nan
        memory = cache.keys.data_ptr(), cache.values.data_ptr()
        torch.testing.assert_close(attention(x[:, -1:], cache=cache), whole[:, -1:])
    assert (cache.keys.data_ptr(), cache.values.data_ptr()) == memory


def test_gradients() -> None:
    attention = build(layouts.from_mask(torch.rand(18, 18) < 0.4, block_size=16), num_kv_heads=3, head_dim=2)
    x = torch.randn(1, 18, 48, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(dict(attention.named_parameters()), parameters))
        return torch.func.functional_call(attention, named, (x,))

    inputs = (x, *attention.parameters())
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_autocast() -> None:
    attention = build(dtype=torch.float32)
    x = torch.randn(2, N, 48, requires_grad=True)
    exact = attention(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(x)
        with torch.no_grad():
            cache = attention.cache(batch=2)
            parts = [attention(part, cache=cache) for part in x.split(40, 1)]
    assert out.dtype == cache.keys.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.15)
    torch.testing.assert_close(torch.cat(parts, 1), out, rtol=0.05, atol=0.05)
    gradient, expected = (torch.autograd.grad(o.float().sum(), x)[0] for o in (out, exact))
    assert gradient.dtype == torch.float32
    assert (gradient - expected).norm() < 0.03 * expected.norm()


def test_dropout_is_for_training_and_follows_the_seed() -> None:
    attention = build(dropout=0.5)
    plain = build()
    plain.load_state_dict(attention.state_dict())
    x = torch.randn(2, N, 48, dtype=torch.float64)

    def drawn(seed: int, backend: str) -> Tensor:
        torch.manual_seed(seed)
        with gdl_kernels.backend(backend):
            return attention(x)

    assert torch.equal(attention(x), plain(x))
    attention.train()
    assert torch.equal(drawn(1, "cpu"), drawn(1, "cpu"))
    assert not torch.equal(drawn(1, "cpu"), drawn(2, "cpu"))
    torch.testing.assert_close(drawn(1, "cpu"), drawn(1, "reference"))


def test_copies_and_files() -> None:
    attention, other = build(), build()
    x = torch.randn(1, N, 48, dtype=torch.float64)
    expected = attention(x)
    assert set(attention.state_dict()) == {"qkv.weight", "qkv.bias", "out.weight", "out.bias"}
    file = io.BytesIO()
    torch.save(attention.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    for again in (other, copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert torch.equal(again(x), expected)
    assert "70 x 70" in repr(attention)


def test_the_layout_keeps_its_integers_when_the_dtype_changes() -> None:
    attention = build(dtype=torch.float32)
    x = torch.randn(1, N, 48)
    expected, layout = attention(x), attention.layout
    for changed in (attention.to(torch.float64), attention.double(), attention.type(torch.float64)):
        assert changed.layout is layout
        torch.testing.assert_close(changed(x.double()).float(), expected)
    attention.to("meta")  # has no values: the layout stays where it has them
    assert attention.layout is layout
    attention.to_empty(device="cpu")
    assert attention.layout is layout


def test_a_layout_is_moved_once_and_kept_as_long_as_it_is_used() -> None:
    layout, meta = layouts.local(N, 20), torch.device("meta")
    assert on_device(layout, layout.device) is layout
    moved = on_device(layout, meta)
    assert on_device(layout, meta) is moved
    assert moved.device == meta
    gone = weakref.ref(moved)
    del moved
    gc.collect()
    assert gone() is None
    assert on_device(layout, meta).device == meta


@pytest.mark.gpu
def test_layers_go_on_sharing_a_layout_on_a_gpu() -> None:
    shared, own = layouts.local(N, 20), layouts.causal(N)
    model = nn.Sequential(*(SparseSelfAttention(48, 6, layout) for layout in (shared, own, shared, shared)))
    x = torch.randn(1, N, 48)
    expected = model(x)
    model.cuda()
    assert model[0].layout is model[2].layout is model[3].layout
    assert model[0].layout.device.type == "cuda"
    torch.testing.assert_close(model(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)
    model.cpu()
    assert model[0].layout is model[2].layout is model[3].layout


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_compiles_once_for_all_lengths_and_all_steps(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    attention, counter = build(num_kv_heads=2), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, backend=counter, fullgraph=True, dynamic=dynamic)
    x = torch.randn(2, N, 48, dtype=torch.float64, requires_grad=True)
    whole, weight = attention(x), torch.randn(2, N, 48, dtype=torch.float64)
    ours, expected = (torch.autograd.grad(out, [x, *attention.parameters()], weight) for out in (compiled(x), whole))
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(compiled(x[:, :50]), whole[:, :50])
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in range(40, N):
            torch.testing.assert_close(compiled(x[:, :n]), whole[:, :n])
    with torch.no_grad():
        cache = attention.cache(batch=2)
        parts = [compiled(x[:, :30], cache=cache), compiled(x[:, 30:31], cache=cache)]
        with torch.compiler.set_stance("fail_on_recompile"):
            # Not the last, which fills the cache: views of all of it are contiguous, and torch guards on that.
            parts += [compiled(x[:, i : i + 1], cache=cache) for i in range(31, N - 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole[:, : N - 1])
    torch._dynamo.reset()


def test_inputs_of_other_lengths() -> None:
    attention = build(layouts.full(N, block_size=16))
    x = torch.randn(2, N, 48, dtype=torch.float64)
    short = layouts.full(40, block_size=16)
    with pytest.raises(ValueError, match=r"^layout must have the 40 positions of x, got Layout\(70 x 70"):
        attention(x[:, :40])
    assert attention(x[:, :40], layout=short).shape == (2, 40, 48)
    assert attention(x[:0]).shape == (0, N, 48)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        (
            {"embed_dim": 50},
            ValueError,
            "embed_dim must be a multiple of num_heads, 6, unless head_dim is given, got 50",
        ),
        ({"embed_dim": 0}, ValueError, "embed_dim must be at least 1, got 0"),
        ({"num_heads": 6.0}, TypeError, "num_heads must be an integer, got 6.0"),
        ({"num_kv_heads": 4}, ValueError, "num_kv_heads must divide num_heads, 6, got 4"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads must be at least 1, got 0"),
        ({"head_dim": 0}, ValueError, "head_dim must be at least 1, got 0"),
        ({"dropout": 1.0}, ValueError, "dropout must be from 0 up to, not including, 1, got 1.0"),
        ({"dropout": "0"}, TypeError, "dropout must be a number, got str"),
        ({"layout": torch.ones(3, 3)}, TypeError, "layout must be a gdl_kernels.layouts.Layout, got Tensor"),
        ({"layout": layouts.fixed(64, 16, 4, heads=3)}, ValueError, "layout must have 1 head .* queries, 6, got 3"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], error: type[Exception], says: str) -> None:
    settings = {"embed_dim": 48, "num_heads": 6, "layout": layouts.causal(N), **changes}
    with pytest.raises(error, match=f"^{says}"):
        SparseSelfAttention(**settings)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.randn(2, 5, 40)}, ValueError, r"x must be \(batch, positions, 48\), got shape \(2, 5, 40\)"),
        (
            {"x": torch.randn(2, 61, 48)},
            ValueError,
            r"layout must have the 71 positions of x and cache, got Layout\(70",
        ),
        ({"x": torch.randn(2, 41, 48)}, ValueError, "cache has room for 50 positions and holds 10, got 41 more"),
        ({"x": torch.randn(3, 5, 48)}, ValueError, r"key must be .* cache's batch of 2, 6 heads and 8 features"),
        ({"layout": 3}, TypeError, "layout must be a gdl_kernels.layouts.Layout, got int"),
        ({"layout": layouts.full(15)}, ValueError, "layout must be causal where there is a cache"),
        (
            {"layout": layouts.causal(14)},
            ValueError,
            r"layout must have the 15 positions of x and cache, got Layout\(14",
        ),
        ({"cache": torch.ones(1)}, TypeError, "cache must be a KeyValueCache, got Tensor"),
        ({"key_padding_mask": torch.zeros(2, 15)}, TypeError, "key_padding_mask must be a bool tensor.*float32"),
        ({"key_padding_mask": [True]}, TypeError, "key_padding_mask must be a bool tensor.*list"),
        ({"key_padding_mask": torch.zeros(2, 5).bool()}, ValueError, r"key_padding_mask must be \(2, 15\), got"),
        (
            {"key_padding_mask": torch.zeros(2, 15, dtype=torch.bool, device="meta")},
            ValueError,
            "key_padding_mask must be on cpu, got meta",
        ),
    ],
)
def test_a_bad_call_is_named_and_the_cache_stays_as_it_was(
    changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    attention = build(dtype=torch.float32)
    cache = attention.cache(batch=2, capacity=50)
    with torch.no_grad():
        attention(torch.randn(2, 10, 48), cache=cache)
        arguments = {"x": torch.randn(2, 5, 48), "cache": cache, **changes}
        with pytest.raises(error, match=f"^{says}"):
            attention(arguments.pop("x"), **arguments)
        assert cache.length == 10
        assert attention(torch.randn(2, 5, 48), cache=cache).shape == (2, 5, 48)


def test_a_cache_passes_no_gradient_on_and_says_so() -> None:
    attention = build()
    cache = attention.cache()
    with pytest.raises(RuntimeError, match=r"key requires a gradient, and a cache passes none on: .*no_grad"):
        attention(torch.randn(1, 5, 48, dtype=torch.float64), cache=cache)
    assert cache.length == 0
    with torch.inference_mode():
        assert attention(torch.randn(1, 5, 48, dtype=torch.float64), cache=cache).shape == (1, 5, 48)


def test_layers_with_patterns_of_their_own() -> None:
    """As the docs have it: the Sparse Transformer's two parts in turn. A position changes what sees it."""
    parts = [layouts.fixed(N, 16, 4, part=part, block_size=16) for part in ("local", "summary")]
    layers = nn.ModuleList(SparseSelfAttention(48, 6, parts[i % 2]) for i in range(4)).double()
    assert layers[0].layout is layers[2].layout is parts[0]
    x = torch.randn(1, N, 48, dtype=torch.float64)
    for i, layer in enumerate(layers):
        changed = x.clone()
        changed[:, 12] += 1
        moved = (layer(x) - layer(changed)).abs().amax((0, 2)) > 0
        assert torch.equal(moved, parts[i % 2].to_mask()[:, 12])
