"""Convolutions that change the resolution, against the two steps that they are one of; the blur."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from models.gans.resampling import blur, conv_of_upsampled, downsample, downsampled_conv, upsample


def test_up_and_down() -> None:
    x = torch.arange(8.0).view(1, 2, 2, 2)
    assert upsample(x)[0, 0].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert downsample(x).flatten().tolist() == [1.5, 5.5]
    assert torch.equal(downsample(upsample(x)), x)


# At the first the images are larger than the weights and one convolution does it, at the second they are smaller.
@pytest.mark.parametrize(("inputs", "outputs", "height", "width"), [(2, 3, 6, 10), (8, 12, 2, 2)])
@pytest.mark.parametrize("down", [True, False])
def test_one_convolution_is_the_two_steps_up_to_the_second_gradient(
    inputs: int, outputs: int, height: int, width: int, down: bool
) -> None:
    x = torch.randn(2, inputs, height, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(outputs, inputs, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(outputs, dtype=torch.float64, requires_grad=True)
    if down:
        ours, expected = downsampled_conv(x, weight, bias), downsample(F.conv2d(x, weight, bias, padding=1))
    else:
        ours, expected = conv_of_upsampled(x, weight, bias), F.conv2d(upsample(x), weight, bias, padding=1)
    torch.testing.assert_close(ours, expected)
    found = []
    for y in (ours, expected):
        gradients = torch.autograd.grad(y.sin().sum(), (x, weight, bias), create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in gradients)
        found.append((*gradients, *torch.autograd.grad(penalty, (x, weight, bias))))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


def test_blur_is_the_filter_1_2_1_both_ways() -> None:
    x = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    padded = F.pad(x, (1, 1, 1, 1))
    rows = (padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]) / 4
    expected = (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 4
    torch.testing.assert_close(blur(x), expected)
    assert torch.autograd.gradcheck(blur, x)
    assert torch.autograd.gradgradcheck(lambda t: blur(t).square(), x)
