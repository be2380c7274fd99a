"""Layers with an equalised learning rate against torch's own with the factors written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from models.gans.equalized import HE, EqualizedConv2d, EqualizedLinear
from models.gans.resampling import upsample


@pytest.mark.parametrize(("gain", "rate", "bias"), [(HE, 1.0, True), (1.0, 0.01, True), (HE / 4, 1.0, False)])
def test_linear_multiplies_weights_by_hes_constant(gain: float, rate: float, bias: bool) -> None:
    layer = EqualizedLinear(48, 80, gain=gain, rate=rate, bias=bias).double()
    assert layer.weight.std().item() == pytest.approx(1 / rate, rel=0.1)
    assert layer.scale == pytest.approx(rate * gain / math.sqrt(48))
    added = None
    if layer.bias is not None:
        assert not layer.bias.any()
        torch.nn.init.normal_(layer.bias)
        added = rate * layer.bias
    x = torch.randn(5, 48, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight * (rate * gain / math.sqrt(48)), added))


# At the first the images are the smaller and are multiplied, at the second the weights are.
@pytest.mark.parametrize(("inputs", "outputs", "size", "side"), [(16, 24, 3, 2), (3, 4, 3, 16), (6, 3, 1, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_convolution_multiplies_weights_by_hes_constant(
    inputs: int, outputs: int, size: int, side: int, bias: bool
) -> None:
    layer = EqualizedConv2d(inputs, outputs, size, bias=bias).double()
    scale = math.sqrt(2 / (inputs * size**2))
    assert layer.scale == pytest.approx(scale)
    assert layer.weight.std().item() == pytest.approx(1, rel=0.4)
    if layer.bias is not None:
        assert not layer.bias.any()
        torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, inputs, side, side, dtype=torch.float64)
    expected = F.conv2d(x, layer.weight * scale, layer.bias, padding=size // 2)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.unscaled(x) * scale, expected)
    if size == 3:
        torch.testing.assert_close(layer(x, downsampled=True), F.avg_pool2d(expected, 2))
        larger = F.conv2d(upsample(x), layer.weight * scale, layer.bias, padding=1)
        torch.testing.assert_close(layer.unscaled(x, of_upsampled=True) * scale, larger)
    weight = layer.weight
    ours, peer = (torch.autograd.grad((y * expected.detach().cos()).sum(), weight)[0] for y in (layer(x), expected))
    torch.testing.assert_close(ours, peer)


def test_signals_keep_their_size_through_many_layers() -> None:
    x = torch.randn(4, 64, 8, 8)
    for _ in range(10):
        x = F.leaky_relu(EqualizedConv2d(64, 64, 3)(x), 0.2)
    assert 0.1 < x.square().mean().sqrt() < 3  # zeros around the images take some
