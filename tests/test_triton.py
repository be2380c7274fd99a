"""Launches past Triton's own dispatch: a kernel is handed to the driver just where Triton would have found the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.dispatch.driver import Driver, launching
from gdl_kernels import _triton

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

CPU = torch.device("cpu")


class Lists(NamedTuple):
    first: Any
    second: Any


@triton.jit(do_not_specialize=["free", "free_too", "start"], do_not_specialize_on_alignment=["loose"])
def copy(
    x, loose, start, lists, addresses, tiles, strides, number, number_too, free, free_too, scale,
    WIDTH: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, WIDTH)
    value = tl.load(x + lane * strides[0] + number).to(tl.float32) * scale
    value += tl.load(lists.first + lane).to(tl.float32) + tl.load(lists.second + lane).to(tl.float32)
    value += tl.load(addresses[0] + lane).to(tl.float32) + number_too + free_too
    if start is not None:
        value += tl.load(start).to(tl.float32)
    if tiles is not None:
        value += tl.reshape(tiles.load([0, 0]), [WIDTH]).to(tl.float32)
    tl.store(loose + free + lane * strides[1], value.to(DTYPE))


memory = torch.zeros(256)


def tensor(offset: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """At an address of as many bytes off 16."""
    return memory.view(torch.uint8)[offset * dtype.itemsize :][:64].view(dtype)


def descriptor(width: int = 16, dtype: torch.dtype = torch.float32, rows: int = 4) -> TensorDescriptor:
    return TensorDescriptor(tensor(dtype=dtype), [rows, width], [width, 1], [1, width])


def arguments(**changed: Any) -> tuple[Any, ...]:
    given = {
        "x": tensor(), "loose": tensor(), "start": None, "lists": Lists(tensor(), tensor()),
        "addresses": (tensor(), tensor()), "tiles": None, "strides": (32, 3), "number": 48, "number_too": 5, "free": 7,
        "free_too": 9, "scale": 0.5,
    }  # fmt: skip
    assert set(changed) <= set(given)
    return tuple((given | changed).values())


CONSTANTS = {"WIDTH": 16, "DTYPE": tl.float32, "num_warps": 4}

#: What Triton compiles anew for.
OTHERS = {
    "x is unaligned": {"x": tensor(1)},
    "x has another dtype": {"x": tensor(dtype=torch.bfloat16)},
    "loose has another dtype": {"loose": tensor(dtype=torch.float16)},
    "there is a start": {"start": tensor(dtype=torch.int64)},
    "a list is unaligned": {"lists": Lists(tensor(), tensor(1))},
    "a list has another dtype": {"lists": Lists(tensor(dtype=torch.int32), tensor())},
    "the other list has": {"lists": Lists(tensor(), tensor(dtype=torch.int32))},
    "an address is of another dtype": {"addresses": (tensor(), tensor(dtype=torch.int32))},
    "an address is unaligned": {"addresses": (tensor(), tensor(1))},
    "there are more addresses": {"addresses": (tensor(), tensor(), tensor())},
    "there are tiles": {"tiles": descriptor()},
    "a tile has another dtype": {"tiles": descriptor(dtype=torch.float16)},
    "a stride is 1": {"strides": (1, 3)},
    "the other stride is 1": {"strides": (32, 1)},
    "16 divides the other stride alone": {"strides": (3, 32)},
    "16 divides both": {"strides": (32, 32)},
    "a stride has 64 bits": {"strides": (2**35, 3)},
    "a number is 1": {"number": 1},
    "16 does not divide a number": {"number": 47},
    "16 divides the other number": {"number_too": 80},
    "a number has 64 bits": {"number": 2**31},
    "a negative one has": {"number_too": -(2**31) - 1},
    "a free number has 64 bits": {"free": 2**31},
    "the other free number has": {"free_too": -(2**40)},
    "a number is a fraction": {"number_too": 0.5},
}

#: What it does not.
SAME = {
    "x is elsewhere": {"x": tensor(4)},
    "loose is unaligned": {"loose": tensor(1)},
    "lists are elsewhere": {"lists": Lists(tensor(8), tensor(4))},
    "other strides": {"strides": (-16, 2**31 - 1)},
    "other numbers": {"number": 0, "number_too": -(2**31) + 1},
    "a free number is 1": {"free": 1},
    "16 divides a free number": {"free_too": 16},
    "another scale": {"scale": 1.0},
}


def variant(args: tuple[Any, ...]) -> list[Any]:
    """By which a warm kernel is found, the types included."""
    key = _triton._key(copy, args)
    assert key is not None
    return [*map(type, args), *key(*args)]


def specialization(args: tuple[Any, ...]) -> list[Any]:
    """By which Triton finds it."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    return create_function_from_signature(copy.signature, copy.params, backend)(*args, WIDTH=16, DTYPE=tl.float32)[1]


@pytest.mark.parametrize("changed", OTHERS.values(), ids=OTHERS)
def test_variants_differ(changed: dict[str, Any]) -> None:
    usual, other = arguments(), arguments(**changed)
    assert specialization(other) != specialization(usual), "the case is none"
    assert variant(other) != variant(usual)


@pytest.mark.parametrize("changed", SAME.values(), ids=SAME)
def test_variants_are_the_same(changed: dict[str, Any]) -> None:
    usual, other = arguments(), arguments(**changed)
    assert specialization(other) == specialization(usual), "the case is none"
    assert variant(other) == variant(usual)


NUMBERS = st.sampled_from([0, 1, 2, 16, 17, -16, 2**31 - 1, 2**31, 2**31 + 16, -(2**31), -(2**31) - 1, 2**62, 2**63])
TENSORS = st.builds(tensor, st.integers(0, 4), st.sampled_from([torch.float32, torch.int32, torch.bfloat16]))
TILES = st.builds(descriptor, st.sampled_from([16, 32]), st.sampled_from([torch.float32, torch.float16]))
ARGUMENTS = st.tuples(
    TENSORS, TENSORS, st.none() | TENSORS, st.builds(Lists, TENSORS, TENSORS), st.tuples(TENSORS, TENSORS),
    st.none() | TILES, st.tuples(NUMBERS, NUMBERS), NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.floats(width=32),
)  # fmt: skip


@given(ARGUMENTS, st.data())
def test_what_is_warm_is_what_triton_would_find(args: tuple[Any, ...], data: st.DataObject) -> None:
    """However few arguments two launches differ in: a variant has all that Triton looks at."""
    others = data.draw(ARGUMENTS)
    places = data.draw(st.sets(st.integers(0, len(args) - 1), max_size=2))
    changed = tuple(others[i] if i in places else arg for i, arg in enumerate(args))
    if variant(changed) == variant(args):
        assert specialization(changed) == specialization(args)


#: The number of each kernel that was launched, and its arguments.
Launched = list[tuple[int, tuple[Any, ...]]]


#: The arguments of what went through Triton's own dispatch.
Dispatched = list[tuple[Any, ...]]


@pytest.fixture
def launched() -> Launched:
    return []


@pytest.fixture
def gpu(launched: Launched, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """A GPU that is not there."""

    def launch(x: int, y: int, z: int, _stream: int, function: int, *rest: Any) -> None:
        _metadata, launch_metadata, enter, leave, *args = rest
        assert (x, y, z) == (3, 1, 1)
        for hook in (enter, leave):
            if hook is not None:
                hook(launch_metadata)
        launched.append((function, tuple(args)))

    monkeypatch.setattr(_triton, "_variants", {})
    monkeypatch.setattr(copy, "device_caches", type(copy.device_caches)(copy.create_binder))
    with launching(launch) as gpu:
        yield gpu


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> Dispatched:
    seen: Dispatched = []
    run = JITFunction.run

    def spied(self: JITFunction, *args: Any, **options: Any) -> Any:
        seen.append(args)
        return run(self, *args, **options)

    monkeypatch.setattr(JITFunction, "run", spied)
    return seen


def launch(args: tuple[Any, ...], **constants: Any) -> None:
    _triton.launch(copy, 3, CPU, *args, **(CONSTANTS | constants))


def test_launches_what_triton_would(gpu: Driver, launched: Launched, dispatched: Dispatched) -> None:
    """Each kind is compiled when it is first launched. Then it is handed the arguments by the driver alone."""
    cases = [arguments(**changed) for changed in ({}, *OTHERS.values(), *SAME.values())]
    cases = [args for args in cases if not isinstance(args[8], float)]  # copied so, but nothing to compile
    found = {}
    for i, args in enumerate(cases):
        copy[(3,)](*args, **CONSTANTS)
        found[i] = launched.pop()
    assert len({function for function, _ in found.values()}) > 20
    del dispatched[:]
    for _ in range(2):
        for i, args in enumerate(cases):
            launch(args)
            assert launched.pop() == found[i]
    assert len(dispatched) == len(OTHERS), "each variant goes through Triton's own dispatch once"


@pytest.mark.parametrize(
    "constants", [{"WIDTH": 32}, {"DTYPE": tl.float16}, {"num_warps": 1}, {"num_stages": 2}], ids=str
)
def test_constants_are_of_the_variant(
    constants: dict[str, Any], gpu: Driver, launched: Launched, dispatched: Dispatched
) -> None:
    args = arguments()
    for _ in range(2):
        launch(args)
        launch(args, **constants)
    assert len(dispatched) == 2
    functions = [function for function, _ in launched]
    assert functions[:2] == functions[2:] == [1, 2]


def test_devices_are_of_the_variant(gpu: Driver, launched: Launched, dispatched: Dispatched) -> None:
    for device in (0, 1, 0, 1):
        gpu.device = device
        launch(arguments())
    assert len(dispatched) == 2
    assert [function for function, _ in launched] == [1, 2, 1, 2]


def test_options_of_the_process_are_of_the_variant(
    gpu: Driver, launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(arguments())
    monkeypatch.setattr(knobs.runtime, "debug", True)
    launch(arguments())
    assert [function for function, _ in launched] == [1, 2]


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_are_called(hook: str, gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's profiler is told of launches that are warm, too."""
    seen: list[str] = []

    def see(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    launch(arguments())
    getattr(knobs.runtime, hook).add(see)
    try:
        launch(arguments())
    finally:
        getattr(knobs.runtime, hook).remove(see)
    launch(arguments())
    assert seen == ["copy"]
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, hook, see)  # in place of the chain
        launch(arguments())
    launch(arguments())
    assert seen == ["copy", "copy"]


def test_hooks_of_a_kernel_are_called(gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    launch(arguments())
    monkeypatch.setattr(copy, "pre_run_hooks", [lambda *args, **_: seen.append(args)])
    launch(arguments())
    assert len(seen) == 1


def test_other_compiler_passes_are_asked_for_at_each_launch(
    gpu: Driver, dispatched: Dispatched, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(arguments())
    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", lambda *_: ("key", "hash"))
    launch(arguments())
    assert len(dispatched) == 2


def test_observers_see_warm_launches(gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(_triton, "observers", [seen.append])
    launch(arguments())
    launch(arguments())
    assert seen[0] is seen[1]
    assert seen[0].name == "copy"


def test_types_that_are_not_known_go_through_triton(gpu: Driver, dispatched: Dispatched) -> None:
    for number in (True, False):
        launch(arguments(number=number))
    assert len(dispatched) == 2


def test_other_tritons_find_their_kernels_themselves(
    gpu: Driver, launched: Launched, dispatched: Dispatched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_triton, "_KNOWN", False)
    for _ in range(2):
        launch(arguments())
    assert len(dispatched) == len(launched) == 2


def test_another_current_device_is_the_tensors_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: the devices are made up."""
    current = [0]

    class Made:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.device.index

        def __exit__(self, *_: Any) -> None:
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "device", Made)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    launched = []
    monkeypatch.setattr(_triton, "_launch", lambda *_: launched.append(current[0]))
    for index in (1, 0):
        _triton.launch(copy, 3, torch.device("cuda", index))
    assert launched == [1, 0]
    assert current == [0]


@pytest.mark.parametrize("number", [0, 1, 2, 3, 7, 8, 9, 2**40, 2**40 + 1])
def test_sizes_are_as_tritons(number: int) -> None:
    assert _triton.power_of_two(number) == triton.next_power_of_2(number)
    for divisor in (1, 3, 16):
        assert _triton.ceil_div(number, divisor) == triton.cdiv(number, divisor)


@pytest.mark.gpu
def test_warm_launches_on_a_gpu(dispatched: Dispatched, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the driver itself: of addresses that are aligned and not, and on the stream that a CUDA graph captures."""
    monkeypatch.setattr(_triton, "_variants", {})
    memory, zeros = torch.randn(256, device="cuda"), torch.zeros(256, device="cuda")
    out = torch.empty(16, device="cuda")

    def fill(offset: int) -> None:
        args = arguments(
            x=memory[offset:], loose=out, lists=Lists(zeros, zeros), addresses=(zeros, zeros), strides=(2, 1),
            number=3, number_too=0, free=0, free_too=0,
        )  # fmt: skip
        _triton.launch(copy, 1, memory.device, *args, **CONSTANTS)

    def assert_filled(offset: int) -> None:
        torch.testing.assert_close(out, 0.5 * memory[offset + 3 :: 2][:16], rtol=0, atol=0)

    for offset in (0, 1, 4, 5, 0):
        fill(offset)
        assert_filled(offset)
    assert len(dispatched) == 2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fill(8)
    out.fill_(torch.nan)
    graph.replay()
    assert_filled(8)


def test_free_numbers_are_told_apart_by_their_bits_alone() -> None:
    large = 2**40
    kinds = [_triton._of_free_numbers(number, large) for number in (-(2**31), 2**31 - 1, 2**31, 2**62, 2**63)]
    assert kinds[0] == kinds[1] != kinds[2] == kinds[3] != kinds[4] != kinds[0]
    assert _triton._of_free_numbers(1, 16) is None
