"""What goes past torch's dispatcher computes the same as through it, and whatever looks at ops still sees them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import gdl_kernels as gdl
from gdl_kernels import _backends, _native
from gdl_kernels._direct import direct
from gdl_kernels.ops.pixel_norm import op
from gdl_kernels.ops.spectral_normalize import op as spectral

needs_cpu = pytest.mark.skipif(bool(_native.missing("cpu")), reason="no C++ kernels")


class SeenByDispatch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.add(func)
        return func(*args, **(kwargs or {}))


class SeenByFunction(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: set[Any] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.add(func)
        return func(*args, **(kwargs or {}))


class Wrapped(Tensor):
    """A subclass that sees ops."""

    ops: ClassVar[set[Any]] = set()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.ops.add(func)
        return super().__torch_function__(func, types, args, kwargs)


def images() -> Tensor:
    return torch.randn(2, 3, 4, 5)


def spied() -> tuple[Callable[..., Any], list[tuple[Any, ...]]]:
    """Pixel norm, and what came to it past the dispatcher."""
    came: list[tuple[Any, ...]] = []

    def implementation(*args: Any) -> Tensor:
        came.append(args)
        return gdl.pixel_norm(args[0], eps=args[1], backend="reference")

    return direct(op.forward.dispatched, implementation, op._save, op._gradient), came


@needs_cpu
@pytest.mark.parametrize("kind", ["tensor", "parameter", "with a gradient", "inference mode"])
def test_plain_calls_go_past_the_dispatcher(kind: str) -> None:
    call, came = spied()
    with torch.inference_mode(kind == "inference mode"):
        x = images()
        if kind == "parameter":
            x = torch.nn.Parameter(x)
        x.requires_grad_(kind == "with a gradient")
        y = call(x, 1e-8, "cpu")
    assert len(came) == 1
    assert y.requires_grad == x.requires_grad
    assert y.is_inference() == (kind == "inference mode")


@needs_cpu
def test_without_grad_mode_there_is_no_graph() -> None:
    with torch.no_grad():
        assert not gdl.pixel_norm(images().requires_grad_()).requires_grad
    x = images().requires_grad_()
    with torch.inference_mode(), torch.enable_grad():  # inference mode wins, as in all of torch
        assert not gdl.pixel_norm(x).requires_grad


@needs_cpu
@pytest.mark.parametrize("mode", [SeenByDispatch, SeenByFunction])
def test_modes_see_ops(mode: type[Any]) -> None:
    call, came = spied()
    with mode() as seen:
        call(images(), 1e-8, "cpu")
    assert op.forward.dispatched in seen.ops
    assert not came


@needs_cpu
def test_subclasses_see_ops() -> None:
    call, came = spied()
    y = call(images().as_subclass(Wrapped), 1e-8, "cpu")
    assert isinstance(y, Wrapped)
    assert op.forward.dispatched in Wrapped.ops
    assert not came


@needs_cpu
def test_the_profiler_sees_ops() -> None:
    with torch.profiler.profile() as profile:
        gdl.pixel_norm(images())
    assert "gdl_kernels::pixel_norm" in {event.name for event in profile.events()}


@needs_cpu
def test_tracers_see_ops() -> None:
    traced = make_fx(lambda x: gdl.pixel_norm(x) + 1)(images())
    assert op.forward.dispatched in {node.target for node in traced.graph.nodes}
    scripted = torch.jit.trace(lambda x: gdl.pixel_norm(x) + 1, images())
    assert "gdl_kernels::pixel_norm" in str(scripted.graph)


@needs_cpu
def test_transforms_see_ops() -> None:
    call, came = spied()
    x = images()
    assert torch.equal(torch.func.functionalize(lambda x: call(x, 1e-8, "cpu"))(x), gdl.pixel_norm(x))
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda x: call(x, 1e-8, "cpu").sum())(x)  # as of every registered op
    assert not came


@needs_cpu
def test_forward_mode_is_refused_and_not_taken_for_a_constant() -> None:
    x, tangent = images(), images()
    with pytest.raises(NotImplementedError, match=r"gdl_kernels::pixel_norm has no forward-mode .* 'cpu'"):
        torch.func.jvp(gdl.pixel_norm, (x,), (tangent,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        us, vs = [torch.ones(4)], [torch.ones(5)]
        for takes_dual in (
            gdl.pixel_norm,
            lambda x: gdl.orthogonalize([x[0, 0]], steps=1),
            lambda x: gdl.spectral_normalize([x[0, 0]], us, vs),
        ):
            with pytest.raises(NotImplementedError, match="backend='reference'"):
                takes_dual(dual)
        assert torch.equal(gdl.pixel_norm(x), gdl.pixel_norm(x.clone()))  # has no tangent
        found = forward_ad.unpack_dual(gdl.pixel_norm(dual, backend="reference")).tangent
    step = 1e-3 * tangent
    quotient = (gdl.pixel_norm(x + step) - gdl.pixel_norm(x - step)) / 2e-3
    torch.testing.assert_close(found, quotient, rtol=1e-2, atol=1e-3)


@needs_cpu
def test_tensors_without_memory_reach_no_kernel() -> None:
    with FakeTensorMode():
        fake = torch.empty(2, 3, 4, 5)
        assert gdl.pixel_norm(fake).shape == fake.shape
    zeros = torch._efficientzerotensor(2, 3, 4, 5)
    assert torch.equal(gdl.pixel_norm(zeros), torch.zeros(2, 3, 4, 5))


@needs_cpu
def test_a_tensor_that_outlived_its_transform_is_one() -> None:
    kept: list[Tensor] = []

    def doubled(x: Tensor) -> Tensor:
        kept.append(x * 2)
        return kept[0].sum()

    x = images().requires_grad_()
    torch.func.grad(doubled)(x)
    assert torch.equal(gdl.pixel_norm(kept[0]), gdl.pixel_norm(x * 2))


@needs_cpu
def test_below_autograd_there_is_no_graph() -> None:
    x = images().requires_grad_()
    with torch._C._AutoDispatchBelowAutograd():  # as in the kernels of C++ ops
        assert not x.mul(2).requires_grad
        assert not gdl.pixel_norm(x).requires_grad


@needs_cpu
def test_a_sign_that_is_not_in_memory_counts() -> None:
    negated = torch.complex(images(), images()).conj().imag
    assert negated.is_neg()
    assert torch.equal(gdl.pixel_norm(negated), gdl.pixel_norm(negated.resolve_neg()))
    weight = torch.complex(torch.randn(4, 6), torch.randn(4, 6)).conj().imag
    us, vs = [torch.nn.functional.normalize(torch.randn(n), dim=0) for n in (4, 6)]
    (normalized,) = gdl.spectral_normalize([weight], [us], [vs], update=False)
    (expected,) = gdl.spectral_normalize([weight.resolve_neg()], [us], [vs], update=False)
    assert torch.equal(normalized, expected)


@needs_cpu
def test_numbers_become_floats() -> None:
    call, came = spied()
    call(images(), 1, "cpu")
    assert [type(arg) for arg in came[0]] == [Tensor, float, str]


@needs_cpu
@pytest.mark.parametrize("name", sorted(_backends.ops()))
def test_is_the_same_as_through_the_dispatcher(name: str) -> None:
    """Bit for bit, gradients included: the kernels are the same."""

    def computed() -> tuple[list[Tensor], list[Tensor]]:
        args, kwargs = copy.deepcopy(example.args), dict(copy.deepcopy(example.kwargs))
        torch.manual_seed(0)
        outputs = tree_leaves(getattr(gdl, name)(*args, **kwargs, backend="cpu"))
        leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        grads = torch.autograd.grad([out.square().sum() for out in outputs], leaves)
        return [out.detach() for out in outputs], list(grads)

    example = next(iter(_backends.ops()[name].examples()))
    example = _backends.Example(example.name, tree_map(_detached, example.args), tree_map(_detached, example.kwargs))
    past = computed()
    with SeenByDispatch() as seen:
        through = computed()
    assert any(func.namespace == "gdl_kernels" for func in seen.ops)
    for ours, theirs in zip(past, through):
        assert len(ours) == len(theirs) > 0
        for a, b in zip(ours, theirs):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()


@needs_cpu
@pytest.mark.parametrize("name", sorted(_backends.ops()))
def test_outputs_can_be_changed_in_place(name: str) -> None:
    """Those of autograd's functions can't be where they are views of something that nobody sees."""
    example = next(iter(_backends.ops()[name].examples()))
    for out in tree_leaves(getattr(gdl, name)(*example.args, **example.kwargs, backend="cpu")):
        assert out.requires_grad
        out.mul_(2)


def _detached(value: Any) -> Any:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


@needs_cpu
def test_lists_of_which_some_tensors_require_a_gradient() -> None:
    weights = [torch.randn(4, 6, requires_grad=wanted) for wanted in (False, True, False)]
    us, vs = ([torch.nn.functional.normalize(torch.randn(n), dim=0) for _ in weights] for n in (4, 6))
    out = gdl.spectral_normalize(weights, us, vs, update=False)
    torch.stack(out).square().sum().backward()
    assert [w.grad is not None for w in weights] == [False, True, False]
    # Vectors are constants to the gradient, and ask for one in vain.
    us[0].requires_grad_()
    out = gdl.spectral_normalize([w.detach() for w in weights], us, vs, update=False)
    torch.stack(out).square().sum().backward()
    assert us[0].grad is None


@needs_cpu
def test_two_threads_go_back_through_one_graph() -> None:
    """Both are in the gradient at once, where each sees which of the weights need one."""
    both, needed = threading.Barrier(2, timeout=60), []

    def gradient(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        both.wait()
        needed.append(ctx.needs_input_grad[0])
        both.wait()
        return spectral._gradient(ctx, *grads)

    def implementation(*args: Any) -> Any:
        return spectral.forward(*args)

    call = direct(spectral.forward.dispatched, implementation, spectral._save, gradient)
    weights = [torch.randn(4, 6, requires_grad=wanted) for wanted in (False, True)]
    us, vs = ([torch.nn.functional.normalize(torch.randn(n), dim=0) for _ in weights] for n in (4, 6))
    cost = torch.stack(call(weights, us, vs, 1, 1e-12, "torch", "cpu")[0]).square().sum()
    with ThreadPoolExecutor(2) as pool:
        going = [pool.submit(torch.autograd.grad, cost, weights[1], retain_graph=True) for _ in range(2)]
        (first,), (second,) = (each.result() for each in going)
    assert torch.equal(first, second)
    assert needed == [[False, True]] * 2
