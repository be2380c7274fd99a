"""Layers that penalties differentiate, against torch's own to the third gradient."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from models.gans.twice import conv2d, leaky_relu_, towards_images

SLOPE = 0.2


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def gradients(y: Tensor, x: Tensor, others: tuple[Tensor, ...]) -> list[Tensor]:
    """By ``x``; of a penalty of that, by all; and of a penalty of these."""
    (first,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    cost = first.square().sum() + y.cos().sum()
    second = torch.autograd.grad(cost, (x, *others), create_graph=True)
    third = torch.autograd.grad(sum(g.sin().sum() for g in second), (x, *others))
    return [first, *second, *third]


# What the discriminators have: 1×1, 3×3, and 4×4 with stride 2; the last leaves a row and a column unread.
@pytest.mark.parametrize(
    ("size", "stride", "padding", "side"), [(1, 1, 0, 5), (3, 1, 1, 6), (4, 2, 1, 8), (3, 2, 0, 6)]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_torchs_to_the_third_gradient(
    size: int, stride: int, padding: int, side: int, memory_format: torch.memory_format
) -> None:
    x, weight, bias = random(3, 4, side, side), random(5, 4, size, size), random(5)
    laid_out = x.to(memory_format=memory_format), weight.to(memory_format=memory_format)
    with towards_images():
        y = conv2d(*laid_out, bias, stride=stride, padding=padding)
        (first,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    cost = first.square().sum() + y.cos().sum()
    second = torch.autograd.grad(cost, (x, weight, bias), create_graph=True)
    third = torch.autograd.grad(sum(g.sin().sum() for g in second), (x, weight, bias))
    expected = F.conv2d(x, weight, bias, stride, padding)
    torch.testing.assert_close(y, expected)
    for ours, peer in zip([first, *second, *third], gradients(expected, x, (weight, bias)), strict=True):
        torch.testing.assert_close(ours, peer)


def test_weights_have_no_part_where_images_alone_are_asked_for() -> None:
    x, weight, bias = random(2, 3, 4, 4), random(2, 3, 3, 3), random(2)
    with towards_images():
        y = conv2d(x, weight, bias, padding=1)
        of_x, *others = torch.autograd.grad(y.sum(), (x, weight, bias), retain_graph=True, allow_unused=True)
        assert of_x is not None
        assert others == [None, None]
    assert all(g is not None for g in torch.autograd.grad(y.sum(), (x, weight, bias)))
    assert type(conv2d(x, weight).grad_fn).__name__ == "ConvolutionBackward0"  # elsewhere it is torch's


def test_weights_have_their_part_while_another_thread_is_inside() -> None:
    x, weight = random(2, 3, 4, 4), random(2, 3, 3, 3)
    with towards_images():
        y = conv2d(x, weight, padding=1)
    with ThreadPoolExecutor(1) as other:
        others = towards_images()
        other.submit(others.__enter__).result()
        elsewhere = conv2d(x, weight, padding=1)
        (of_weight,) = torch.autograd.grad(y.sum(), weight, allow_unused=True)
        other.submit(others.__exit__, None, None, None).result()
    assert of_weight is not None
    assert type(elsewhere.grad_fn).__name__ == "ConvolutionBackward0"


def test_a_penalty_convolves_no_images_with_images() -> None:
    class Kernels(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default):
                weight = args[1] if func is torch.ops.aten.convolution.default else args[2]
                seen.append(tuple(weight.shape[2:]))
            return func(*args, **(kwargs or {}))

    seen: list[tuple[int, ...]] = []
    x, weight = torch.randn(2, 3, 16, 16, requires_grad=True), torch.randn(5, 3, 3, 3, requires_grad=True)
    with Kernels():
        with towards_images():
            (gradient,) = torch.autograd.grad(conv2d(x, weight, padding=1).sin().sum(), x, create_graph=True)
        gradient.square().sum().backward()
    assert len(seen) == 6  # forward, by images; then these two differentiated, each by both
    assert set(seen) == {(3, 3)}


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (4, 7)])
def test_leaky_relu_is_torchs_in_place(shape: tuple[int, ...]) -> None:
    x = random(*shape)
    before = x * 1.0
    y = leaky_relu_(before, SLOPE)
    assert y.data_ptr() == before.data_ptr()
    expected = F.leaky_relu(x, SLOPE)
    assert torch.equal(y, expected)
    for ours, peer in zip(gradients(y, x, ()), gradients(expected, x, ()), strict=True):
        torch.testing.assert_close(ours, peer)
