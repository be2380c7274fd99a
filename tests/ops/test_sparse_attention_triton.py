"""The Triton kernels of sparse_attention, in Triton's interpreter and, where there is one, on a GPU.

Whether kernels are interpreted is settled when they are imported, so the interpreter gets a process of its own: this
file again, under ``TRITON_INTERPRET=1``. The cases are the same on both.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gdl_kernels import layouts, sparse_attention
from gdl_kernels.layouts import Layout
from gdl_kernels.ops.sparse_attention import op
from tests.accuracy import assert_accurate

pytest.importorskip("triton", reason="triton is not installed")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETING else "cuda"
on_device = pytest.mark.usefixtures("nan_poison") if INTERPRETING else pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.skipif(INTERPRETING, reason="this is the interpreter's process")
def test_the_cases_hold_in_the_interpreter() -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    inner = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))],
        cwd=root, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    print(inner.stdout, inner.stderr)
    assert inner.returncode == 0, "the cases failed under TRITON_INTERPRET=1; their output is above"
    summary = inner.stdout.strip().splitlines()[-1]
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (\w+)", summary)}
    assert counts["passed"] >= len(CASES), summary
    assert counts["skipped"] == 1, f"this test alone does not run in the interpreter: {summary}"


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one call, and the pattern: each pair kept with probability ``keep``, causal or not."""

    block_size: int = 32
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    n_q: int = 70
    n_k: int = 70
    query_start: int = 0
    layout_n: int | None = None  # where the layout is longer than the call
    head_dim: int = 16
    value_dim: int = 16
    keep: float = 0.5
    layout_heads: int = 1
    causal: bool = True
    orders: int = 0
    padded: int = 0
    strided: bool = False
    with_lse: bool = True

    def layout(self) -> Layout:
        n_q, n_k = (self.layout_n, self.layout_n) if self.layout_n is not None else (self.n_q, self.n_k)
        mask = torch.rand(self.layout_heads, n_q, n_k) < self.keep * torch.rand(self.layout_heads, n_q, 1) * 2
        mask[:, n_q // 2 :, : n_k // 2] |= torch.rand(self.layout_heads, 1, 1) < 0.7  # some full blocks
        if self.causal:
            mask = mask.tril()
        mask[:, n_q // 3] = False  # one row keeps nothing
        if not self.orders:
            return layouts.from_mask(mask, block_size=self.block_size).to(DEVICE)
        mask = mask.expand(max(self.layout_heads, self.orders), -1, -1)
        order = torch.stack([torch.randperm(n_q) for _ in range(self.orders)])
        placed = torch.stack([m[p][:, p] for m, p in zip(mask, order.expand(len(mask), -1))])
        layout = layouts.from_mask(placed, block_size=self.block_size)
        return dataclasses.replace(layout, order=order.to(torch.int32), causal=self.causal).to(DEVICE)

    def tensors(self, dtype: torch.dtype) -> list[Tensor]:
        shapes = [
            (self.batch, self.heads, self.n_q, self.head_dim),
            (self.batch, self.kv_heads, self.n_k, self.head_dim),
            (self.batch, self.kv_heads, self.n_k, self.value_dim),
        ]
        if self.strided:  # (B, D, N, H) in memory: nothing is contiguous where the kernels would like it
            made = [torch.randn(b, d, n, h, dtype=dtype, device=DEVICE).permute(0, 3, 2, 1) for b, h, n, d in shapes]
        else:
            made = [torch.randn(shape, dtype=dtype, device=DEVICE) for shape in shapes]
        return [t.requires_grad_() for t in made]

    def padding(self) -> Tensor | None:
        if not self.padded:
            return None
        mask = torch.zeros(self.batch, self.n_k, dtype=torch.bool, device=DEVICE)
        mask[-1, -self.padded :] = True
        mask[0, 3] = True
        return mask


CASES = {
    "blocks of 16, four to a tile of keys": Case(block_size=16, heads=1, kv_heads=1),
    "blocks of 32": Case(block_size=32),
    "blocks of 64": Case(block_size=64, n_q=100, n_k=100, heads=1, kv_heads=1),
    "blocks of 128, two programs or two tiles to a block": Case(block_size=128, n_q=150, n_k=150, heads=1, kv_heads=1),
    "lengths that fill whole blocks": Case(block_size=16, n_q=64, n_k=64),
    "more keys than queries, not causal": Case(n_q=40, n_k=75, causal=False),
    "every pair kept: full blocks alone, but for the tail": Case(block_size=16, keep=2, causal=False),
    "nothing kept at all": Case(keep=0, causal=False, block_size=64, n_q=20, n_k=20),
    "four query heads share a key head": Case(heads=4, kv_heads=1, batch=2, n_q=40, n_k=40),
    "values narrower than keys, sizes that are no power of two": Case(head_dim=80, value_dim=24, n_q=40, n_k=40),
    "values wider than keys": Case(head_dim=24, value_dim=80, n_q=40, n_k=40),
    "one feature": Case(head_dim=1, value_dim=1, n_q=20, n_k=20),
    "the largest head": Case(head_dim=256, value_dim=256, n_q=40, n_k=40, heads=1, kv_heads=1),
    "strides of a transposed tensor": Case(strided=True, batch=2, n_q=50, n_k=50),
    "a pattern for each head, unequal counts": Case(heads=3, kv_heads=3, layout_heads=3),
    "a pattern for each head, and shared keys": Case(heads=4, kv_heads=2, layout_heads=4, n_q=40, n_k=40),
    "reordered, one order for all": Case(orders=1),
    "reordered, an order for each head": Case(orders=2),
    "reordered by head, and shared keys": Case(heads=4, kv_heads=2, orders=4, n_q=40, n_k=40),
    "decoding: one query at the end of a full cache": Case(n_q=1, n_k=70, query_start=69, layout_n=70),
    "three queries in the middle of a block": Case(n_q=3, n_k=45, query_start=41, layout_n=70),
    "one query of a growing cache": Case(n_q=1, n_k=30, query_start=29, layout_n=100),
    "decoding, reordered: most tiles hold no query": Case(n_q=3, n_k=33, query_start=30, layout_n=70, orders=1),
    "padded keys": Case(batch=2, padded=33),
    "padded keys in full tiles": Case(batch=2, padded=40, keep=2, block_size=16),
    "padded keys, reordered, shared": Case(batch=2, padded=20, heads=4, kv_heads=2, orders=1, n_q=40, n_k=40),
    "no gradient through lse": Case(with_lse=False),
}


#: The interpreter takes seconds a case: there float16, whose tiles bfloat16 shares, has every case, the others these.
IN_EVERY_DTYPE = [
    "blocks of 16, four to a tile of keys",
    "four query heads share a key head",
    "padded keys, reordered, shared",
]


@on_device
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, id=f"{name}, {str(dtype)[6:]}")
        for name in CASES
        for dtype in DTYPES
        if not INTERPRETING or dtype == torch.float16 or name in IN_EVERY_DTYPE
    ],
)
def test_outputs_and_gradients(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    torch.manual_seed(list(CASES).index(name))
    layout, inputs, padding = case.layout(), case.tensors(dtype), case.padding()
    cotangents: list[Tensor] = []

    def run(backend: str, tensors: list[Tensor]) -> list[Tensor]:
        out, lse = sparse_attention(
            *tensors, layout, key_padding_mask=padding, query_start=case.query_start, return_lse=True, backend=backend
        )
        if not cotangents:
            # The gradient of an lse of -inf is no number.
            cotangents[:] = torch.randn_like(out), torch.randn_like(lse).masked_fill(lse.isinf(), 0)
        used = 2 if case.with_lse else 1
        weights = [c.to(o.dtype) for c, o in zip(cotangents, (out, lse))]
        return [out, lse, *torch.autograd.grad((out, lse)[:used], tensors, weights[:used])]

    plain = run("reference", inputs)
    exact = run("reference", [t.detach().double().requires_grad_() for t in inputs])
    ours = run("triton", inputs)
    for what, *values in zip(("out", "lse", "grad_query", "grad_key", "grad_value"), ours, plain, exact):
        if what == "lse":
            values[1] = values[1].to(torch.float32)
        assert_accurate(*values, what)


@on_device
@pytest.mark.parametrize("shape", [(0, 2, 20), (1, 2, 0)], ids=["no batch", "no queries"])
def test_empty(shape: tuple[int, int, int]) -> None:
    batch, heads, n_q = shape
    layout = layouts.from_mask(torch.rand(20, 20) < 0.5, block_size=16).to(DEVICE)
    query = torch.randn(batch, heads, n_q, 16, device=DEVICE, requires_grad=True)
    key, value = (torch.randn(batch, heads, 20, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    out = sparse_attention(query, key, value, layout, backend="triton")
    assert out.shape == query.shape
    for gradient, tensor in zip(torch.autograd.grad(out.sum(), (query, key, value)), (query, key, value)):
        assert gradient.shape == tensor.shape
        assert not gradient.any()


@on_device
def test_two_runs_agree_to_the_bit() -> None:
    case = Case(heads=4, kv_heads=2, layout_heads=4, block_size=16)
    torch.manual_seed(1)
    layout, inputs = case.layout(), case.tensors(torch.float16)
    weight = torch.randn(1, 4, 70, 16, dtype=torch.float16, device=DEVICE)

    def run() -> list[Tensor]:
        out = sparse_attention(*inputs, layout, backend="triton")
        return [out, *torch.autograd.grad(out, inputs, weight)]

    for first, second in zip(run(), run()):
        assert torch.equal(first, second)


@on_device
def test_nan_in_padded_keys_goes_nowhere() -> None:
    torch.manual_seed(2)
    layout = layouts.from_mask(torch.rand(70, 70) < 0.5, block_size=32).to(DEVICE)
    inputs = Case().tensors(torch.float32)
    padding = torch.zeros(1, 70, dtype=torch.bool, device=DEVICE)
    padding[0, 40:] = True
    clean = sparse_attention(*inputs, layout, key_padding_mask=padding, backend="triton")
    with torch.no_grad():
        inputs[1][:, :, 40:], inputs[2][:, :, 40:] = torch.nan, torch.inf
    out = sparse_attention(*inputs, layout, key_padding_mask=padding, backend="triton")
    assert torch.equal(out, clean)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert all(g.isfinite().all() for g in grads)
    assert not grads[1][:, :, 40:].any()
    assert not grads[2][:, :, 40:].any()


@on_device
def test_negative_scale_and_large_scores() -> None:
    torch.manual_seed(3)
    layout = layouts.from_mask(torch.rand(40, 40) < 0.5, block_size=16).to(DEVICE)
    query, key, value = (torch.randn(1, 2, 40, 16, device=DEVICE) * 30 for _ in range(3))
    ours, plain, exact = (
        sparse_attention(q, k, v, layout, scale=-0.7, backend=backend)
        for (q, k, v), backend in [
            ((query, key, value), "triton"),
            ((query, key, value), "reference"),
            ((query.double(), key.double(), value.double()), "reference"),
        ]
    )
    assert_accurate(ours, plain, exact)


@on_device
def test_strides_of_every_gradient_are_filled() -> None:
    # The op's outputs take the strides of its inputs; expanded keys have none of their own.
    torch.manual_seed(4)
    layout = layouts.from_mask(torch.rand(40, 40) < 0.5, block_size=16).to(DEVICE)
    query = torch.randn(2, 40, 2, 16, device=DEVICE).transpose(1, 2)
    key, value = (torch.randn(1, 2, 40, 16, device=DEVICE).expand(2, -1, -1, -1) for _ in range(2))
    out, lse = op.forward(query, key, value, None, layout.tensors(), [40, 40, 16], 0.25, 0, "triton")
    grad_out = torch.ones(1, 1, 1, 16, device=DEVICE).expand_as(out)
    grads = op.backward(
        grad_out, None, query, key, value, out, lse, None, layout.tensors(), [40, 40, 16], 0.25, 0, "triton"
    )
    assert all(g.isfinite().all() for g in grads)
