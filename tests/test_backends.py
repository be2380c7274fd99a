"""Which backend serves a call, and what is said of the others."""

from __future__ import annotations

import subprocess
import sys
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import gdl_kernels as gdl
from gdl_kernels import _backends, _native
from gdl_kernels.ops.pixel_norm import op as pixel_norm


def choices(op: str, **reasons: list[str]) -> _backends.Choices:
    return _backends.Choices(op, {name: (lambda *a, why=why, **k: list(why)) for name, why in reasons.items()}, list)


def call() -> tuple[Any, ...]:
    query, key, value = torch.randn(3, 1, 2, 32, 16).unbind()
    return query, key, value, gdl.layouts.from_mask(torch.rand(32, 32) < 0.7, block_size=16)


CPU = torch.device("cpu")


def test_auto_takes_the_first_that_can() -> None:
    assert choices("a", cpu=[]).pick(CPU, None) == "cpu"
    assert choices("a", cuda=[], triton=[]).pick(torch.device("cuda"), None) == "cuda"
    assert choices("a", triton=[]).pick(torch.device("cuda"), None) == "triton"


def test_auto_without_a_kernel_is_the_reference_and_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choices("a", triton=["no GPU"]).pick(CPU, None) == "reference"


def test_auto_warns_once_of_each_reason() -> None:
    slow = choices("an op of test_auto_warns_once", cpu=["it rains"])
    with pytest.warns(UserWarning, match="slower backend 'reference' because of cpu: it rains"):
        assert slow.pick(CPU, None) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert slow.pick(CPU, None) == "reference"
    other = choices("an op of test_auto_warns_once", cpu=["it snows"])
    with pytest.warns(UserWarning, match="it snows"):
        other.pick(CPU, None)


def test_a_warning_is_of_the_line_that_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pixel_norm.choices.reasons, "cpu", lambda *_, **__: ["it rains on images"])
    with pytest.warns(UserWarning, match="it rains on images") as caught:
        gdl.pixel_norm(torch.randn(2, 3, 4, 5))
    assert caught[0].filename == __file__


def test_asking_for_a_backend_that_cannot_raises_with_every_reason() -> None:
    with pytest.raises(RuntimeError, match=r"backend 'cuda' can't serve this a: no GPU; too wide"):
        choices("a", cuda=["no GPU", "too wide"]).pick(CPU, "cuda")
    with pytest.raises(RuntimeError, match="a has no triton kernel"):
        choices("a", cpu=[]).pick(CPU, "triton")
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', 'reference'.*got 'gpu'"):
        choices("a", cpu=[]).pick(CPU, "gpu")


def test_a_region_chooses_and_a_call_overrides_it() -> None:
    op = choices("a", cpu=[])
    with gdl.backend("reference"):
        assert op.pick(CPU, None) == "reference"
        assert op.pick(CPU, "cpu") == "cpu"
        with gdl.backend("cpu"):
            assert op.pick(CPU, None) == "cpu"
        assert op.pick(CPU, None) == "reference"
    assert op.pick(CPU, None) == "cpu"
    with pytest.raises(KeyError), gdl.backend("reference"):
        raise KeyError
    assert op.pick(CPU, None) == "cpu"
    with pytest.raises(ValueError, match="got 'gpu'"), gdl.backend("gpu"):
        pass


def test_a_region_is_seen_by_other_threads() -> None:
    """As the backward pass runs in PyTorch's own."""
    seen = []
    with gdl.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(choices("a", cpu=[]).pick(CPU, None)))
        thread.start()
        thread.join()
    assert seen == ["reference"]


@pytest.mark.parametrize("name", ["reference", "triton", "nonsense"])
def test_the_environment_chooses_for_a_process(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDL_KERNELS_BACKEND", name)
    code = (
        "import torch\nfrom gdl_kernels import _backends\n"
        "op = _backends.Choices('a', {'cpu': lambda: [], 'triton': lambda: []}, list)\n"
        "print(op.pick(torch.device('cpu'), None))"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if name == "nonsense":
        assert outcome.returncode
        assert "GDL_KERNELS_BACKEND must be one of" in outcome.stderr
    else:
        assert outcome.stdout.strip() == name, outcome.stderr


def test_explain_has_a_verdict_for_each_backend_and_uses_up_no_warning() -> None:
    args = call()
    told = gdl.explain(gdl.sparse_attention, *args, backend="reference")
    assert list(told.verdicts) == list(_backends.BACKENDS)
    assert told.verdicts["reference"] == "chosen"
    assert told.verdicts["cuda"] == "sparse_attention has no cuda kernel"
    assert "query is on cpu" in told.verdicts["triton"] or _native.interpreting()
    assert str(told).splitlines()[0] == "sparse_attention"
    assert len(str(told).splitlines()) == 1 + len(_backends.BACKENDS)
    before = set(_backends._warned)
    gdl.explain("sparse_attention", *args)
    assert before == _backends._warned


def test_explain_agrees_with_the_call() -> None:
    args = call()
    told = gdl.explain("sparse_attention", *args).verdicts
    for name in _backends.BACKENDS:
        if told[name] in ("chosen", "can"):
            gdl.sparse_attention(*args, backend=name)
        else:
            with pytest.raises(RuntimeError, match="can't serve"):
                gdl.sparse_attention(*args, backend=name)


def test_explain_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"op must be one of .*sparse_attention"):
        gdl.explain("attention")
    with pytest.raises(ValueError, match="needs the tensors"):
        gdl.explain("sparse_attention")


def test_available_backends_are_all_named() -> None:
    available = gdl.available_backends()
    assert list(available) == list(_backends.BACKENDS)
    assert available["reference"] == "available"
    if not torch.cuda.is_available():
        assert available["cuda"] != "available"


def test_every_op_is_public_and_has_examples() -> None:
    for name, op in _backends.ops().items():
        assert name in gdl.__all__
        examples = list(op.examples())
        assert examples
        for example in examples:
            arguments = tree_leaves((example.args, dict(example.kwargs)))
            assert any(a.requires_grad for a in arguments if isinstance(a, torch.Tensor))


def test_regions_of_threads_may_end_in_any_order() -> None:
    outer, inner = gdl.backend("reference"), gdl.backend("cpu")
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert _backends._regions == [("cpu",)]
    inner.__exit__(None, None, None)
    assert _backends._regions == []


@pytest.fixture(autouse=True)
def _picking_anew() -> Iterator[None]:
    with _backends.picking_anew():
        yield


needs_native = pytest.mark.skipif(bool(_native.missing("cpu")), reason="no C++ kernels")


def counted(growing: dict[str, int] | None = None) -> tuple[Callable[..., str], list[tuple[Any, ...]]]:
    """A check that refuses numbers below zero, and the calls that it was made for."""
    made: list[tuple[Any, ...]] = []
    choices_of_it = choices(f"an op of {uuid.uuid4()}", cpu=[])

    def check(backend: str | None, first: Any, second: Any = None, *rest: Any) -> str:
        args = first, second, *rest
        made.append(args)
        if any(type(a) is float and a < 0 for a in args):
            raise ValueError("below zero")
        return choices_of_it.pick(CPU, backend)

    return choices_of_it.serving(check, growing), made


@needs_native
def test_a_kind_of_call_is_checked_once() -> None:
    serving, made = counted()
    weights = [torch.randn(2, 3), torch.randn(3)]
    for _ in range(3):
        assert serving(None, torch.randn(2, 3), weights, None, 1.0, 2, True, "text", torch.float16) == "cpu"
    assert len(made) == 1


@needs_native
@pytest.mark.parametrize("backend", [None, "auto", "cpu"])
def test_calls_that_differ_in_anything_but_numbers_of_tensors_are_of_other_kinds(backend: str | None) -> None:
    serving, made = counted()
    x = torch.randn(2, 3)
    kinds: list[tuple[Any, ...]] = [
        (x, 1), (x, True), (x, 1.0), (x, 2.0), (x, None), (x, "1"), (x, "2"), (x, torch.float32), (x, torch.float64),
        (x,), ([x],), ([x, x],), ([x], x), (x, [x]), ([], x, x), (1, x), (x.double(), 1), (x.bfloat16(), 1),
        (x.half(), 1), (x.t(), 1), (x.t().contiguous(), 1), (x[:1], 1), (x[None], 1), (x.detach().requires_grad_(), 1),
    ]  # fmt: skip
    for kind in kinds:
        serving(backend, *kind)
    assert len(made) == len(kinds)
    for kind in kinds:
        assert serving(backend, *kind) == "cpu"
    assert len(made) == len(kinds)


@needs_native
def test_tensors_may_grow_and_be_of_a_kind() -> None:
    serving, made = counted({"first": 1, "second": 0})
    table = torch.randn(90, 90)
    for n in (3, 4, 70):
        for first in (table[:2, :n], table[:2, :n].clone(), table[:n, :2].t()):  # strides differ
            serving(None, first, table[:n], 0)
    assert len(made) == 1
    kinds: list[tuple[Any, ...]] = [
        (table[:2, :5], table[:6], 0),  # not of one size
        (table[:3, :5], table[:5], 0),
        (table[:2, :5], table[:5, :80], 0),
        (table[:2, :5, None], table[:5], 0),
        (table[:2, :5].double(), table[:5], 0),
        (table[:2, :5], table[:5].detach().requires_grad_(), 0),
        (table[:2, :5], None, 0),
        (None, table[:5], 0),
        (table[:2, :5], table[:5], 1),
    ]
    for kind in kinds * 2:
        serving(None, *kind)
    assert len(made) == 1 + len(kinds)


@needs_native
def test_a_bad_call_is_refused_each_time() -> None:
    serving, _ = counted()
    x = torch.randn(2, 3)
    for _ in range(2):
        assert serving(None, x, 1.0) == "cpu"
        with pytest.raises(ValueError, match="below zero"):
            serving(None, x, -1.0)
    for _ in range(2):
        assert gdl.pixel_norm(x).shape == x.shape
        with pytest.raises(ValueError, match="eps must be positive"):
            gdl.pixel_norm(x, eps=-1.0)
        with pytest.raises(TypeError, match="x must be float32"):
            gdl.pixel_norm(x.long())


@needs_native
@pytest.mark.parametrize(
    "odd",
    [object(), 2**70, Fraction(1, 2), torch.empty(2, 3, device="meta"), {"x": 1}],
    ids=["object", "large integer", "fraction", "meta tensor", "dictionary"],
)
def test_what_has_no_signature_is_checked_each_time(odd: Any) -> None:
    serving, made = counted()
    for _ in range(2):
        serving(None, torch.randn(2, 3), odd)
    assert len(made) == 2


@needs_native
def test_a_region_is_another_kind_of_call() -> None:
    serving, made = counted()
    x = torch.randn(2, 3)
    assert serving(None, x) == "cpu"
    with gdl.backend("reference"):
        assert serving(None, x) == "reference"
    assert serving(None, x) == "cpu"
    assert len(made) == 2


@needs_native
def test_no_more_kinds_are_remembered_than_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "REMEMBERED", 3)
    serving, made = counted()
    for n in range(1, 9):
        serving(None, torch.randn(n))
        assert len(_backends._served) <= 3
    assert len(made) == 8
