"""spectral_norm_all: the layers of a network together, whatever is done with the network."""

from __future__ import annotations

import copy
import io
import itertools
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import gdl_kernels
from gdl_kernels import remove_spectral_norm_all, spectral_norm, spectral_norm_all
from gdl_kernels.nn import spectral_norm as one_layer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(5, 6)
        self.up = nn.ConvTranspose2d(3, 8, 3)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.out = nn.Linear(8, 6)

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        x = self.block(self.up(x)).mean((2, 3))
        return (self.out(x) * self.classes(classes)).sum(1)


WEIGHTS = ("classes", "up", "block.0", "out")


def build(norm: Callable[[nn.Module], Any] | None = None) -> Net:
    """With ``norm`` on each layer, or without all of them by ours."""
    torch.manual_seed(0)
    net = Net()
    torch.manual_seed(1)
    if norm is None:
        return spectral_norm_all(net)
    for name in WEIGHTS:
        norm(net.get_submodule(name))
    return net


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 6, 6), torch.randint(5, (4,))


def vectors(net: nn.Module) -> list[Tensor]:
    return [b.clone() for name, b in net.named_buffers() if name.endswith(("._u", "._v"))]


def assert_same(a: nn.Module, b: nn.Module, **tolerance: float) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], **(tolerance or {"rtol": 1e-4, "atol": 1e-5}))


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small only wait for a second one
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def calls() -> Iterator[list[int]]:
    """How many weights each call of the op is given."""
    counts: list[int] = []

    def counted(weights: list[Tensor], *args: Any, **options: Any) -> list[Tensor]:
        counts.append(len(weights))
        return gdl_kernels.spectral_normalize(weights, *args, **options)

    with mock.patch.object(one_layer, "spectral_normalize", counted):
        yield counts


def test_one_call_a_forward(calls: list[int]) -> None:
    net = build()
    calls.clear()
    net(*inputs())
    net.eval()(*inputs())
    assert calls == [4, 4]
    net.out.weight  # noqa: B018  a read outside of a forward pass
    assert calls == [4, 4, 1]


def test_a_hundred_steps_as_torch_takes_them() -> None:
    """As D is trained: two forward passes before a backward pass."""
    ours, theirs = build(), build(parametrizations.spectral_norm)
    assert_same(ours, theirs)
    optimizers = [torch.optim.SGD(m.parameters(), 0.02) for m in (ours, theirs)]
    for _ in range(100):
        real, fake = inputs(), inputs()
        for module, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
            (torch.relu(1 - module(*real)) + torch.relu(1 + module(*fake))).mean().backward()
            optimizer.step()
    assert_same(ours, theirs, rtol=1e-3, atol=1e-4)
    given = inputs()
    torch.testing.assert_close(ours.eval()(*given), theirs.eval()(*given), rtol=1e-3, atol=1e-4)


def test_eval_moves_nothing_and_gives_the_same() -> None:
    net, given = build().eval(), inputs()
    before = vectors(net)
    assert torch.equal(net(*given), net(*given))
    assert all(map(torch.equal, before, vectors(net)))


def test_training_moves_all_vectors_once() -> None:
    net, alone = build(), build(spectral_norm)
    net(*inputs())
    for name in WEIGHTS:
        alone.get_submodule(name).weight  # noqa: B018
    assert all(map(torch.equal, vectors(net), vectors(alone)))


def biggans_weights(w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and the next u in BigGAN-PyTorch's order."""
    matrix = w.flatten(1)
    v = nn.functional.normalize(u @ matrix, dim=0)
    u = nn.functional.normalize(matrix @ v, dim=0)
    return w / (u @ matrix @ v), u


def test_biggans_order() -> None:
    net = spectral_norm_all(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), semantics="biggan")
    norm = net[0].parametrizations.weight[0]
    original = net[0].parametrizations.weight.original.detach()
    x = torch.randn(3, 6)
    for training in (True, True, False, False, True):
        net.train(training)
        expected, next_u = biggans_weights(original, norm._u.clone())
        before = norm._u.clone()
        seen: list[Tensor] = []
        handle = net[0].register_forward_hook(lambda layer, args, output, seen=seen: seen.append(layer.weight))
        net(x)
        handle.remove()
        torch.testing.assert_close(seen[0], expected)
        torch.testing.assert_close(norm._u, next_u if training else before)


def test_gradient_of_two_forwards_is_the_sum_of_each() -> None:
    net, first, second = build(), inputs(), inputs()
    twin = copy.deepcopy(net)
    (net(*first).sum() + net(*second).sum()).backward()
    twin(*first).sum().backward()
    twin(*second).sum().backward()
    for p, q in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


def test_copies_live_on_their_own() -> None:
    """An EMA copy, as torch's AveragedModel makes it."""
    net = build()
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        net(*inputs()).sum().backward()
        optimizer.step()
        average.update_parameters(net)  # which copies buffers
    given = inputs()
    before = vectors(net)
    average(*given)
    assert all(map(torch.equal, before, vectors(net)))
    clone = copy.deepcopy(net)
    assert torch.equal(clone(*given), net(*given))
    assert_same(clone, net, rtol=0, atol=0)
    clone(*given)
    assert not all(map(torch.equal, vectors(clone), vectors(net)))


def test_a_copy_that_is_made_in_the_middle() -> None:
    net, copies = build(), []
    net.block.register_forward_hook(lambda *_: copies.append(copy.deepcopy(net.out)))
    net(*inputs())
    layer = copies[0]
    assert layer.parametrizations.weight[0].kept is None
    layer(torch.randn(1, 8))


def test_the_state_dict_is_saved_and_loaded() -> None:
    net, other = build(), build(parametrizations.spectral_norm)
    net(*inputs())
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    again = spectral_norm_all(Net())
    again.load_state_dict(other.state_dict())
    assert_same(net, again, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="only supported through state_dict"):  # as torch's parametrizations
        torch.save(net, io.BytesIO())


def test_nothing_is_kept_after_a_forward_or_an_error() -> None:
    net = build()
    norms = [m for m in net.modules() if isinstance(m, one_layer.SpectralNorm)]
    with pytest.raises(RuntimeError):
        net(torch.randn(1, 9, 9, 9), torch.zeros(1, dtype=torch.int64))
    assert all(norm.kept is None for norm in norms)
    net(*inputs())
    assert all(norm.kept is None for norm in norms)


def test_autocast() -> None:
    net = build()
    twin, given = copy.deepcopy(net), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(*given)
    y.sum().backward()
    twin(*given).sum().backward()
    assert y.dtype == torch.bfloat16 or y.dtype == torch.float32
    assert all(map(torch.equal, vectors(net), vectors(twin)))
    for p, q in zip(net.parameters(), twin.parameters()):
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad, q.grad, rtol=0.1, atol=0.1 * q.grad.abs().max().item() + 1e-4)


def test_no_grad_and_grad_within_one_forward(calls: list[int]) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                return self.layer(x)

    net = spectral_norm_all(Mixed())
    twin, x = copy.deepcopy(net), torch.randn(2, 4)
    with torch.no_grad():
        y = net(x)
    y.square().sum().backward()
    twin(x).square().sum().backward()
    assert torch.equal(*(vectors(m)[0] for m in (net, twin)))
    torch.testing.assert_close(*(m.layer.parametrizations.weight.original.grad for m in (net, twin)))
    with torch.inference_mode():
        net(x)
    net(x).sum().backward()


def test_a_layer_used_twice_has_one_weight(calls: list[int]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    net = spectral_norm_all(Twice()).double()
    calls.clear()
    x = torch.randn(2, 4, dtype=torch.float64)
    before = copy.deepcopy(net)
    net(x).square().sum().backward()
    assert calls == [1]
    weight, bias = before.layer.weight, before.layer.bias
    y = nn.functional.linear(torch.tanh(nn.functional.linear(x, weight, bias)), weight, bias)
    y.square().sum().backward()
    torch.testing.assert_close([p.grad for p in net.parameters()], [p.grad for p in before.parameters()])


def test_frozen_layers() -> None:
    net = build()
    net.block.requires_grad_(False)
    net.out.parametrizations.weight.original.requires_grad_(False)
    net(*inputs()).sum().backward()
    assert net.block[0].parametrizations.weight.original.grad is None
    assert net.out.parametrizations.weight.original.grad is None
    assert net.up.parametrizations.weight.original.grad.any()
    net.requires_grad_(False)
    assert not net(*inputs()).requires_grad


def test_a_layer_in_eval_mode_takes_no_step() -> None:
    net = build()
    net.out.eval()
    moved = [name for name, b in net.named_buffers() if name.endswith("_u")]
    before = vectors(net)[::2]
    net(*inputs())
    still = [name for name, a, b in zip(moved, before, vectors(net)[::2]) if torch.equal(a, b)]
    assert still == ["out.parametrizations.weight.0._u"]


def test_two_layers_with_one_parameter() -> None:
    def tied(norm: Callable[[nn.Module], Any] | None) -> nn.Module:
        torch.manual_seed(5)
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        net[2].weight = net[0].weight
        if norm is None:
            spectral_norm_all(net)
        else:
            norm(net[0])
            norm(net[2])
        return net

    ours, theirs, x = tied(None), tied(parametrizations.spectral_norm), torch.randn(3, 4)
    assert ours[0].parametrizations.weight.original is ours[2].parametrizations.weight.original
    for net in (ours, theirs):
        net(x).square().sum().backward()
    torch.testing.assert_close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])
    assert_same(ours, theirs)


def test_layers_come_and_go(calls: list[int]) -> None:
    net = spectral_norm_all(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    net.append(spectral_norm(nn.Linear(4, 4)))
    net.append(nn.Linear(4, 4))
    x = torch.randn(2, 4)
    calls.clear()
    net(x)
    assert calls == [3]
    gone = net[0]
    del net[0]
    net(x)
    gone(x)
    assert calls == [3, 2, 1]
    spectral_norm_all(net)
    calls.clear()
    net(x)
    assert calls == [3]
    assert len(net._forward_pre_hooks) == 1


def test_a_root_within_a_root(calls: list[int]) -> None:
    inner = spectral_norm_all(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    outer = spectral_norm_all(nn.Sequential(inner, nn.Linear(4, 4), inner))
    calls.clear()
    outer(torch.randn(2, 4))
    assert calls == [3]
    inner(torch.randn(2, 4))
    assert calls == [3, 2]


def test_other_settings_are_other_calls(calls: list[int]) -> None:
    net = nn.Sequential(spectral_norm(nn.Linear(4, 4), n_power_iterations=2), nn.Linear(4, 4), nn.Linear(4, 4))
    spectral_norm_all(net)
    net[2].double()
    calls.clear()
    with pytest.raises(RuntimeError):  # float64 after float32
        net(torch.randn(2, 4))
    assert sorted(calls) == [1, 1, 1]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor, classes: Tensor) -> Tensor:
            x = checkpoint(lambda x: self.block(self.up(x)), x, use_reentrant=use_reentrant).mean((2, 3))
            return (self.out(x) * self.classes(classes)).sum(1)

    net = build()
    twin = spectral_norm_all(Checkpointed())
    twin.load_state_dict(net.state_dict())
    x, classes = inputs()
    x.requires_grad_()
    for module in (net, twin):
        module(x, classes).square().sum().backward()
    assert all(map(torch.equal, vectors(net), vectors(twin)))
    for p, q in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("semantics", ["torch", "biggan"])
def test_compiles_into_one_graph(semantics: str) -> None:
    torch.manual_seed(0)
    net = spectral_norm_all(Net(), semantics=semantics)
    twin = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for training in (True, True, False):
        net.train(training)
        twin.train(training)
        given = inputs()
        y, expected = compiled(*given), twin(*given)
        torch.testing.assert_close(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close([p.grad for p in net.parameters()], [p.grad for p in twin.parameters()])
        assert_same(net, twin)


def test_removal_undoes_all() -> None:
    net, given = build().eval(), inputs()
    twin, y = copy.deepcopy(net), net(*given)
    parameters = {id(p) for p in net.parameters()}
    remove_spectral_norm_all(net)
    torch.testing.assert_close(net(*given), y)
    assert sorted(net.state_dict()) == sorted(Net().state_dict())
    assert {id(p) for p in net.parameters()} == parameters
    assert not net._forward_pre_hooks
    assert not net._forward_hooks
    torch.testing.assert_close(twin(*given), y)  # shares its classes with net
    remove_spectral_norm_all(twin, leave_parametrized=False)
    plain = build(lambda layer: None).state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in twin.state_dict().items())


def test_what_is_normalised() -> None:
    net = nn.ModuleDict(
        {
            "linear": nn.Linear(2, 3), "conv": nn.Conv1d(2, 3, 1), "norm": nn.BatchNorm1d(3),
            "embed": nn.Embedding(4, 2), "shared": nn.Embedding(4, 2), "skipped": nn.Sequential(nn.Linear(2, 2)),
        }
    )  # fmt: skip

    def normalised(skip: Any) -> list[str]:
        module = spectral_norm_all(copy.deepcopy(net), skip=skip(net) if callable(skip) else skip)
        return [name for name, m in module.items() if parametrize.is_parametrized(m)]

    def named(net: nn.Module) -> Callable[[str, nn.Module], bool]:
        return lambda name, layer: name in ("shared", "skipped.0") or isinstance(layer, nn.Conv1d)

    assert normalised(named) == ["linear", "embed"]
    spectral_norm_all(net, skip=[net.shared, net.skipped])
    assert [name for name, m in net.named_modules() if parametrize.is_parametrized(m)] == ["linear", "conv", "embed"]
    assert parametrize.is_parametrized(spectral_norm_all(nn.Linear(2, 3)), "weight")


def linear_and(second: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), second)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: spectral_norm_all([nn.Linear(2, 2)]), TypeError, "root must be a module, got list"),
        (lambda: spectral_norm_all(nn.Linear(2, 2), semantics="x"), ValueError, "semantics must be.*got 'x'"),
        (lambda: spectral_norm_all(nn.Linear(2, 2), n_power_iterations=0), ValueError, "positive integer, got 0"),
        (lambda: spectral_norm_all(nn.Linear(2, 2), skip=[3]), TypeError, "skip must be modules.*got int"),
        (
            lambda: spectral_norm_all(linear_and(nn.LazyLinear(2))),
            ValueError, "layer '1', LazyLinear, must be initialised, or be skipped",
        ),
        (
            lambda: spectral_norm_all(linear_and(parametrizations.weight_norm(nn.Linear(2, 2)))),
            ValueError, "layer '1', ParametrizedLinear, must have a plain weight.*is parametrized",
        ),
        (
            lambda: spectral_norm_all(linear_and(nn.utils.spectral_norm(nn.Linear(2, 2)))),
            ValueError, "layer '1', Linear, must have a parameter 'weight', or be skipped",
        ),
        (
            lambda: spectral_norm_all(linear_and(nn.Embedding(2, 2, sparse=True))),
            ValueError, "layer '1', Embedding, must not have sparse gradients, or be skipped",
        ),
    ],
)  # fmt: skip
def test_bad_input(call: Callable[[], nn.Module], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_the_layer_that_is_not_finite_is_named() -> None:
    net = build()
    before = vectors(net)
    with torch.no_grad():
        net.block[0].parametrizations.weight.original[1, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"the weight of layer 'block.0' must be finite"):
        net(*inputs())
    assert all(map(torch.equal, before, vectors(net)))
    with torch.no_grad():
        net.block[0].parametrizations.weight.original[1, 0, 0, 0] = 0
    net(*inputs())


DDP = """
    import os, sys, torch
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel
    from tests.nn.test_spectral_norm_all import build, inputs

    broadcast = sys.argv[1] == "1"
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    net = build()
    parallel = DistributedDataParallel(net, broadcast_buffers=broadcast)
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    torch.manual_seed(100 + rank)
    for _ in range(4):
        real, fake = inputs(), inputs()
        optimizer.zero_grad()
        # Buffers that are broadcast at the second forward pass belong to the graph of none.
        (parallel(*real) - parallel(*fake)).square().sum().backward()
        optimizer.step()
    for name, tensor in net.state_dict().items():
        if "running" in name and not broadcast:
            continue
        other = tensor.clone()
        distributed.broadcast(other, 0)
        assert torch.equal(other, tensor) or "running" in name, (rank, name)
    distributed.barrier()
    # Not through the interpreter's end: a thread of gloo that still runs then ends the process by std::terminate.
    os._exit(0)
"""


@pytest.mark.parametrize("broadcast", [True, False])
def test_two_processes(broadcast: bool, tmp_path: Path) -> None:
    script = tmp_path / "ddp.py"
    script.write_text(textwrap.dedent(DDP))
    environment = {
        **os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "MASTER_ADDR": "localhost", "WORLD_SIZE": "2",
        "MASTER_PORT": str(29500 + os.getpid() % 2000 + broadcast), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(int(broadcast))],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(itertools.chain(outputs))
