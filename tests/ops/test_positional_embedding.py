"""positional_embedding by every backend.

Tests with the argument ``kernel`` run for the C++ kernels, the Triton kernels on a GPU and, where TRITON_INTERPRET=1
is set, for the Triton kernels in their interpreter. That is settled when they are imported, so the interpreter has a
process of its own: this file again, as a test of the first process.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gdl_kernels
from gdl_kernels import _backends, _native, nn, positional_embedding
from gdl_kernels.ops.positional_embedding import op
from gdl_kernels.ops.positional_embedding.phases import phase_steps
from tests.accuracy import assert_accurate
from tests.ops.positional_embedding_cases import (
    CASES,
    DTYPES,
    INTERPRETING,
    KERNELS,
    MEMORY,
    SIZES,
    TOKENS,
    Kernel,
    check,
    for_each_kernel,
    random,
    random_tokens,
    run,
)

pytestmark = pytest.mark.usefixtures("nan_poison")


@for_each_kernel
@pytest.mark.parametrize(("order", "memory", "dtype"), CASES, ids=str)
@pytest.mark.parametrize(("shape", "rows", "columns"), SIZES, ids=str)
def test_output_and_gradient(
    kernel: Kernel, shape: tuple[int, ...], rows: int, columns: int, order: str, memory: str, dtype: torch.dtype
) -> None:
    backend, device = kernel
    if INTERPRETING and (order, memory, dtype) not in (CASES[0], CASES[2]) and columns != 37:
        pytest.skip("in the interpreter one size stands for all")
    tokens = TOKENS[order](random_tokens(shape, rows, device))
    weight = MEMORY[memory](random((rows, columns), dtype, device))
    grad = MEMORY[memory](random((*shape, columns), dtype, device))
    check(tokens, weight, grad, backend, start=3)


@pytest.mark.skipif(INTERPRETING, reason="float64 is for the others")
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize(("shape", "rows", "columns"), SIZES, ids=str)
def test_float64(shape: tuple[int, ...], rows: int, columns: int, memory: str) -> None:
    tokens, grad = random_tokens(shape, rows), random((*shape, columns), torch.float64)
    weight = MEMORY[memory](random((rows, columns), torch.float64))
    check(tokens, weight, grad, "cpu", scale=-0.3, start=20)


@st.composite
def laid_out(draw: st.DrawFn, x: Tensor) -> Tensor:
    """The same numbers, in memory with the dimensions in any order and with gaps."""
    order = draw(st.permutations(range(x.dim())))
    steps = [draw(st.integers(1, 2)) for _ in order]
    memory = x.new_zeros([x.shape[d] * steps[d] for d in order]).permute([order.index(d) for d in range(x.dim())])
    view = memory[tuple(slice(None, None, step) for step in steps)]
    return view.copy_(x)


@pytest.mark.skipif(INTERPRETING, reason="of the C++ kernels")
@given(st.data(), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_any_shape_strides_and_dtype(data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    shape = tuple(data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4)))
    rows, columns = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 80))
    dtype, scale = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([None, 0.0, -2.5, 3]))
    tokens = data.draw(laid_out(random_tokens(shape, rows).to(data.draw(st.sampled_from([torch.int32, torch.int64])))))
    weight = data.draw(laid_out(random((rows, columns), dtype)))
    grad = data.draw(laid_out(random((*shape, columns), dtype)))
    check(tokens, weight, grad, "cpu", scale=scale, start=data.draw(st.integers(0, 100)))


@pytest.mark.parametrize("backend", ["reference", *([] if INTERPRETING else ["cpu"])])
def test_against_the_formula(backend: str) -> None:
    tokens, weight = random_tokens((3, 6), 5), random((5, 7), torch.float64)
    out = positional_embedding(tokens, weight, start=4, backend=backend)
    for b in range(3):
        for n in range(6):
            for j in range(7):
                angle = (4 + n) / 10_000 ** (j // 2 * 2 / 7)
                position = math.cos(angle) if j % 2 else math.sin(angle)
                expected = math.sqrt(7) * weight[tokens[b, n], j].item() + position
                assert out[b, n, j].item() == pytest.approx(expected, rel=1e-13, abs=1e-13)


def exact_sinusoids(start: int, count: int, width: int) -> Tensor:
    """In 40 digits, then rounded to float64."""
    with mpmath.workdps(40):
        rates = [mpmath.mpf(10_000) ** (mpmath.mpf(-2 * (j // 2)) / width) for j in range(width)]
        functions = [(mpmath.sin, mpmath.cos)[j % 2] for j in range(width)]
        return torch.tensor(
            [[float(f((start + n) * rate)) for f, rate in zip(functions, rates)] for n in range(count)],
            dtype=torch.float64,
        )


@for_each_kernel
@pytest.mark.parametrize("start", [0, 1000, 65_535, 10**6, 10**8 - 7, 2**32 - 7, 10**11])
def test_positions_far_along(kernel: Kernel, start: int) -> None:
    """All that a position loses is the rounding of the angle within one turn, and that of the result."""
    backend, device = kernel
    weight, tokens = torch.zeros(1, 34, device=device), torch.zeros(20, dtype=torch.int64, device=device)
    out = positional_embedding(tokens, weight, start=start, backend=backend).cpu().double()
    assert (out - exact_sinusoids(start, 20, 34)).abs().max().item() < 1.2e-7  # a unit in the last place of 1


@pytest.mark.skipif(INTERPRETING, reason="float64 is for the others")
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("start", [0, 1000, 10**6, 10**8])
def test_positions_far_along_in_float64(backend: str, start: int) -> None:
    weight, tokens = torch.zeros(1, 34, dtype=torch.float64), torch.zeros(20, dtype=torch.int64)
    out = positional_embedding(tokens, weight, start=start, backend=backend)
    # Of a position, float64 is off by some 2^-53; a step in 2^-64ths of a turn by 2^-65 of a turn.
    a_position = 2.0**-52 if backend == "reference" else 2 * math.pi * 2.0**-65
    error = (out - exact_sinusoids(start, 20, 34)).abs().max().item()
    assert error < 4e-16 + (start + 20) * a_position


@pytest.mark.parametrize("width", [1, 2, 37, 512, 4096])
def test_phase_steps(width: int) -> None:
    steps = phase_steps(width, torch.device("cpu")).tolist()
    assert len(steps) == (width + 1) // 2
    with mpmath.workdps(40):
        for i, step in enumerate(steps):
            turns = mpmath.mpf(10_000) ** (mpmath.mpf(-2 * i) / width) / (2 * mpmath.pi)
            assert abs(step - turns * 2**64) <= 0.5 + 1e-9


@for_each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_part_has_the_bits_of_the_whole(kernel: Kernel, dtype: torch.dtype) -> None:
    """Decoding with a cache gives what the whole sequence gave."""
    backend, device = kernel
    tokens, weight = random_tokens((2, 40), 30, device), random((30, 50), dtype, device)
    whole = positional_embedding(tokens, weight, start=10**6, backend=backend)
    for begin, end in ((0, 1), (7, 8), (13, 40)):
        part = positional_embedding(tokens[:, begin:end], weight, start=10**6 + begin, backend=backend)
        assert torch.equal(part, whole[:, begin:end])


@for_each_kernel
def test_offsets_beyond_32_bits(kernel: Kernel) -> None:
    backend, device = kernel
    apart, columns = 2**31 + 64, 24
    torch.use_deterministic_algorithms(False)  # poison would touch it
    storage = torch.empty(apart + columns, dtype=torch.bfloat16, device=device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    far = storage.as_strided((2, columns), (apart, 1))
    far.copy_(random((2, columns), torch.bfloat16, device))
    tokens = torch.tensor([1, 0], device=device)
    check(tokens, far, random((2, columns), torch.bfloat16, device), backend)
    check(tokens, random((2, columns), torch.bfloat16, device), far, backend)


@pytest.mark.xdist_group("gigabytes")
@pytest.mark.gpu
def test_more_than_2_to_the_31_elements() -> None:
    tokens = random_tokens((3, 1_400_000), 50, "cuda")
    weight = random((50, 512), torch.bfloat16, "cuda").requires_grad_()
    out = positional_embedding(tokens, weight, backend="triton")
    assert out.numel() > 2**31
    last = positional_embedding(tokens[2:, -9:], weight, start=1_399_991, backend="reference")
    assert_accurate(out[2:, -9:], last, positional_embedding(
        tokens[2:, -9:], weight.double(), start=1_399_991, backend="reference"))  # fmt: skip
    (grad,) = torch.autograd.grad(out, weight, torch.ones_like(out))
    counts = torch.bincount(tokens.flatten(), minlength=50).double()[:, None] * math.sqrt(512)
    torch.testing.assert_close(grad.double(), counts.expand(50, 512), rtol=2**-8, atol=0)


@for_each_kernel
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 5)], ids=str)
def test_no_tokens(kernel: Kernel, shape: tuple[int, ...]) -> None:
    for backend in (kernel[0], "reference"):
        tokens = torch.empty(shape, dtype=torch.int64, device=kernel[1])
        out, grad = run(
            tokens, random((3, 4), torch.float32, kernel[1]), torch.empty(*shape, 4, device=kernel[1]), backend
        )
        assert out.shape == (*shape, 4)
        assert torch.equal(grad, torch.zeros(3, 4, device=kernel[1]))


@for_each_kernel
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(kernel: Kernel, bad: float) -> None:
    backend, device = kernel
    tokens = torch.tensor([[0, 1, 2, 1], [3, 3, 2, 0]], device=device)
    weight, grad = random((4, 20), torch.float32, device), random((2, 4, 20), torch.float32, device)
    weight[2, 7] = grad[0, 3, 11] = bad
    (out, grad_weight), (plain_out, plain_grad) = (run(tokens, weight, grad, b) for b in (backend, "reference"))
    torch.testing.assert_close(out, plain_out, equal_nan=True)
    torch.testing.assert_close(grad_weight, plain_grad, equal_nan=True)
    assert (~out.isfinite()).nonzero().tolist() == [[0, 2, 7], [1, 2, 7]]
    assert (~grad_weight.isfinite()).nonzero().tolist() == [[1, 11]]


@pytest.mark.skipif(INTERPRETING, reason="float64 is for the others")
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_of_both_orders(backend: str) -> None:
    tokens = torch.tensor([[0, 3, 3, 1], [3, 0, 4, 4]])
    weight = random((5, 3), torch.float64).requires_grad_()

    def function(weight: Tensor) -> Tensor:
        return positional_embedding(tokens, weight, scale=1.7, start=2, backend=backend)

    torch.autograd.gradcheck(function, weight)
    torch.autograd.gradgradcheck(function, weight)


@pytest.mark.skipif(INTERPRETING, reason="float64 is for the others")
def test_third_derivatives() -> None:
    def third(backend: str) -> Tensor:
        weight = table.clone().requires_grad_()
        value = positional_embedding(tokens, weight, backend=backend).pow(4).sum()
        for _ in range(3):
            (last,) = torch.autograd.grad(value, weight, create_graph=True)
            value = last.pow(2).sum()
        return last

    tokens, table = random_tokens((2, 9), 4), random((4, 5), torch.float64)
    torch.testing.assert_close(third("cpu"), third("reference"))


@for_each_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_second_gradient_of_each_dtype(kernel: Kernel, dtype: torch.dtype) -> None:
    backend, device = kernel
    tokens, weight, v = random_tokens((2, 30), 9, device), *(random((9, 20), dtype, device) for _ in range(2))
    given = random((2, 30, 20), dtype, device)

    def second(backend: str, dtype: torch.dtype) -> Tensor:
        table, grad = weight.to(dtype).requires_grad_(), given.to(dtype).requires_grad_()
        out = positional_embedding(tokens, table, backend=backend)
        (first,) = torch.autograd.grad(out, table, grad, create_graph=True)
        return torch.autograd.grad(first, grad, v.to(dtype))[0]

    assert_accurate(second(backend, dtype), second("reference", dtype), second("reference", torch.float64))


@pytest.mark.skipif(INTERPRETING, reason="as on the other backends")
@for_each_kernel
@pytest.mark.parametrize("order", ["int32", "every other"])
def test_registration(kernel: Kernel, order: str) -> None:
    backend, device = kernel
    tokens = TOKENS[order](random_tokens((2, 6), 5, device))
    weight = random((5, 8), torch.float32, device).requires_grad_()
    grad = random((2, 6, 8), torch.float32, device).requires_grad_()
    torch.library.opcheck(op.forward.dispatched, (tokens, weight, 1.5, 7, backend))
    torch.library.opcheck(op.backward.dispatched, (grad, tokens, 5, 1.5, backend))


def test_meta_tensors() -> None:
    tokens = torch.empty(2, 6, dtype=torch.int64, device="meta")
    weight = torch.empty(5, 8, dtype=torch.bfloat16, device="meta")
    out = positional_embedding(tokens, weight)
    assert (out.shape, out.dtype, out.device.type) == ((2, 6, 8), torch.bfloat16, "meta")


@pytest.mark.skipif(INTERPRETING, reason="as on the other backends")
@pytest.mark.parametrize(
    ("backend", "device"),
    [("reference", "cpu"), ("cpu", "cpu"), pytest.param("triton", "cuda", marks=pytest.mark.gpu)],
)
def test_one_graph_serves_all_lengths_and_starts(backend: str, device: str) -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    def function(tokens: Tensor, weight: Tensor, start: int) -> Tensor:
        return positional_embedding(tokens + 1, weight, start=start, backend=backend) * 2

    compiled = {
        "inductor": torch.compile(function, fullgraph=True, dynamic=True),
        "counted": torch.compile(function, fullgraph=True, dynamic=True, backend=count),
    }
    for shape, start in (((2, 5), 3), ((4, 9), 64), ((3, 130), 10**6)):
        tokens, weight = random_tokens(shape, 8, device), random((9, 24), torch.float32, device)
        grad = random((*shape, 24), torch.float32, device)
        results = []
        for call in (function, *compiled.values()):
            leaf = weight.clone().requires_grad_()
            out = call(tokens, leaf, start)
            results.append((out.detach(), torch.autograd.grad(out, leaf, grad)[0]))
        for other in results[1:]:
            torch.testing.assert_close(other, results[0])
    assert len(graphs) == 1


@pytest.mark.skipif(INTERPRETING, reason="as on the other backends")
def test_compiled_code_refuses_tokens_out_of_range() -> None:
    compiled = torch.compile(lambda t, w: positional_embedding(t, w), fullgraph=True, dynamic=True)
    weight = random((9, 4), torch.float32)
    compiled(torch.tensor([3, 8]), weight)
    with pytest.raises(ValueError, match=r"tokens\[1\] must be from 0 to 8, a row of weight, got 9"):
        compiled(torch.tensor([3, 9]), weight)


@for_each_kernel
def test_autocast_leaves_the_dtype(kernel: Kernel) -> None:
    for backend in (kernel[0], "reference"):
        for dtype in (torch.float32, torch.bfloat16):
            tokens, weight = random_tokens((2, 3), 4, kernel[1]), random((4, 6), dtype, kernel[1])
            with torch.autocast(kernel[1], dtype=torch.bfloat16):
                out = positional_embedding(tokens, weight, backend=backend)
            assert out.dtype == dtype
            assert torch.equal(out, positional_embedding(tokens, weight, backend=backend))


@pytest.mark.gpu
def test_runs_on_the_current_stream_and_in_a_graph() -> None:
    tokens, weight = random_tokens((4, 64), 30, "cuda"), random((30, 96), torch.float32, "cuda")
    positional_embedding(tokens, weight)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = positional_embedding(tokens, weight)
    tokens.copy_(29 - tokens)
    graph.replay()
    assert torch.equal(captured, positional_embedding(tokens, weight))


@pytest.mark.gpu
def test_two_runs_give_the_same_bits_on_a_gpu() -> None:
    tokens, weight = random_tokens((16, 512), 300, "cuda"), random((300, 512), torch.float32, "cuda")
    tokens[:, 300:] = 0  # padding
    grad = random((16, 512, 512), torch.float32, "cuda")
    assert all(map(torch.equal, run(tokens, weight, grad, "triton"), run(tokens, weight, grad, "triton")))


@pytest.mark.skipif(INTERPRETING, reason="of the C++ kernels")
@pytest.mark.parametrize("shape", [(3, 700), (200, 3)], ids=str)
def test_any_number_of_threads_gives_the_same_bits(shape: tuple[int, ...]) -> None:
    tokens, weight = random_tokens(shape, 40), random((40, 200), torch.float32)
    tokens[:, shape[1] // 2 :] = 0  # padding
    grad = random((*shape, 200), torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            results.append(run(tokens, weight, grad, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


# Best first; this CPU's own are tested by all the rest.
CAPABILITIES = list(_native.VARIANTS)


@pytest.mark.skipif(INTERPRETING, reason="of the C++ kernels")
@pytest.mark.parametrize("capability", CAPABILITIES[CAPABILITIES.index(torch.backends.cpu.get_cpu_capability()) + 1 :])
def test_kernels_for_lesser_cpus(capability: str) -> None:
    # The capability is read once in a process, so a process of its own runs the same tests.
    names = "cpu and (test_output_and_gradient or test_gradients_of_both_orders or far_along or whole)"
    environment = {"ATEN_CPU_CAPABILITY": capability.lower(), "OMP_NUM_THREADS": "1"}
    _tests_of_another_process(names, environment)


@pytest.mark.skipif(INTERPRETING, reason="this is the interpreter's process")
def test_triton_kernels_in_their_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    passed = _tests_of_another_process("(triton or out_of_range_on_a_gpu) and not interpreter", environment)
    assert passed > 2 * len(SIZES) + len(CASES)


def _tests_of_another_process(names: str, environment: dict[str, str]) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", names]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return int(re.findall(r"(\d+) passed", done.stdout)[0])


@pytest.mark.skipif(INTERPRETING, reason="the interpreter makes other backends able")
def test_backend_is_chosen_and_explained() -> None:
    tokens, weight = random_tokens((2, 3), 4), random((4, 6), torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(positional_embedding(tokens, weight), positional_embedding(tokens, weight, backend="cpu"))
    verdicts = gdl_kernels.explain(positional_embedding, tokens, weight).verdicts
    assert verdicts["cpu"] == "chosen"
    assert verdicts["reference"] == "can"
    assert "weight is on cpu" in verdicts["triton"]
    assert verdicts["cuda"] == "positional_embedding has no cuda kernel"
    with pytest.raises(RuntimeError, match=r"backend 'triton' can't serve this positional_embedding.*weight is on cpu"):
        positional_embedding(tokens, weight, backend="triton")


def test_what_the_triton_kernels_refuse() -> None:
    tokens, weight = random_tokens((2, 3), 4), random((4, 6), torch.float64)
    assert "weight is float64" in gdl_kernels.explain(positional_embedding, tokens, weight).verdicts["triton"]


def test_module() -> None:
    module = nn.PositionalEmbedding(9, 6, scale=0.5)
    tokens = random_tokens((2, 5), 9)
    assert torch.equal(module(tokens, 3), positional_embedding(tokens, module.weight, scale=0.5, start=3))
    assert repr(module) == "PositionalEmbedding(9, 6, scale=0.5)"
    low = nn.PositionalEmbedding(9, 6, device="cpu", dtype=torch.bfloat16)
    assert low(tokens).dtype == torch.bfloat16
    assert nn.PositionalEmbedding(9, 6, device="meta").weight.is_meta


def test_module_takes_the_place_of_an_embedding() -> None:
    torch.manual_seed(1)
    embedding = torch.nn.Embedding(9, 6)
    torch.manual_seed(1)
    module = nn.PositionalEmbedding(9, 6)
    assert torch.equal(module.weight, embedding.weight)
    module.weight.data.zero_()
    module.load_state_dict(embedding.state_dict())
    tokens = random_tokens((2, 5), 9)
    positions = module(tokens) - math.sqrt(6) * embedding(tokens)
    torch.testing.assert_close(positions[0], exact_sinusoids(0, 5, 6).float(), rtol=0, atol=1e-6)


IDS = torch.tensor([[0, 1], [2, 3]])
TABLE = torch.ones(4, 6)


@pytest.mark.parametrize(
    ("tokens", "weight", "call", "error", "message"),
    [
        ([[0, 1]], TABLE, {}, TypeError, "tokens must be a tensor, got list"),
        (IDS.float(), TABLE, {}, TypeError, "tokens must be int64 or int32, got torch.float32"),
        (IDS.bool(), TABLE, {}, TypeError, "tokens must be int64 or int32, got torch.bool"),
        (IDS[0, 0], TABLE, {}, ValueError, r"tokens must be \(\.\.\., N\), got shape \(\)"),
        (IDS, TABLE.long(), {}, TypeError, "weight must be float32.*got torch.int64"),
        (IDS, [[1.0]], {}, TypeError, "weight must be a tensor, got list"),
        (IDS, TABLE[0], {}, ValueError, r"weight must be \(V, D\) with a row and a column at least, got shape \(6,\)"),
        (IDS, TABLE[:0], {}, ValueError, r"weight must be \(V, D\) with a row.*, got shape \(0, 6\)"),
        (IDS, TABLE[:, :0], {}, ValueError, r"weight must be \(V, D\) with a row.*, got shape \(4, 0\)"),
        (IDS, TABLE.to("meta"), {}, ValueError, "weight must be on the device of tokens, cpu, got meta"),
        (IDS, TABLE, {"scale": "1"}, TypeError, "scale must be a number, got str"),
        (IDS, TABLE, {"scale": math.inf}, ValueError, "scale must be finite, got inf"),
        (IDS, TABLE, {"start": 1.0}, TypeError, "start must be an integer, got float"),
        (IDS, TABLE, {"start": -1}, ValueError, r"start must be from 0 to 2\^53 less the 2 positions, got -1"),
        (IDS, TABLE, {"start": 2**53 - 1}, ValueError, r"start must be from 0 to 2\^53 less the 2 positions, got 9007"),
        (IDS, TABLE[:3], {}, ValueError, r"tokens\[1, 1\] must be from 0 to 2, a row of weight, got 3"),
        (IDS.int() - 1, TABLE, {}, ValueError, r"tokens\[0, 0\] must be from 0 to 3, a row of weight, got -1"),
        (IDS[:, 1] + 2**33, TABLE, {}, ValueError, r"tokens\[0\] must be from 0 to 3, a row of weight, got 8589934593"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", ["reference", None] if INTERPRETING else ["reference", "cpu", None])
def test_bad_input(
    backend: str | None, tokens: Any, weight: Any, call: dict[str, Any], error: type[Exception], message: str
) -> None:
    for _ in range(2):  # nor is it taken for the good one, which is remembered
        assert positional_embedding(IDS, TABLE, backend=backend).shape == (2, 2, 6)
        with pytest.raises(error, match=message):
            positional_embedding(tokens, weight, backend=backend, **call)


@pytest.mark.skipif(bool(_native.missing("cpu")), reason="no C++ kernels, no calls remembered")
def test_decoding_is_one_kind_of_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each token would be checked anew, and remembered."""
    monkeypatch.setattr(_backends, "_served", {})
    for start in range(9):
        positional_embedding(IDS, TABLE, start=start)
    assert len(_backends._served) == 1


@pytest.mark.skipif(INTERPRETING, reason="of the C++ kernels")
def test_the_last_position_that_is_taken() -> None:
    assert positional_embedding(IDS, TABLE, start=2**53 - 2).isfinite().all()


@pytest.mark.skipif(INTERPRETING, reason="of the C++ kernels")
def test_the_backward_op_refuses_tokens_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"tokens\[1, 1\] must be from 0 to 2, a row of weight, got 3"):
        op.backward(torch.ones(2, 2, 6), IDS, 3, 1.0, "cpu")


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if kernel.id == "triton"])
def test_tokens_out_of_range_on_a_gpu(kernel: Kernel) -> None:
    """What can't be said without waiting shows: their rows are NaN. They add to no gradient."""
    backend, device = kernel
    tokens = torch.tensor([[0, -1, 4, 2], [2**40, 2, -(2**63), 0]], device=device)
    weight, grad = random((4, 6), torch.float32, device), random((2, 4, 6), torch.float32, device)
    out, grad_weight = run(tokens, weight, grad, backend)
    outside = (tokens < 0) | (tokens > 3)
    assert out[outside].isnan().all()
    plain_out, plain_grad = run(
        tokens.masked_fill(outside, 0), weight, grad.masked_fill(outside[..., None], 0), "reference"
    )
    torch.testing.assert_close(out[~outside], plain_out[~outside])
    torch.testing.assert_close(grad_weight, plain_grad)
