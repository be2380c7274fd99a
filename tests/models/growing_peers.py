"""The discriminator of ProGAN and StyleGAN in formulas, with what else tests of both share."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def convolved(weights: dict[str, Tensor], name: str, x: Tensor, gain: float = math.sqrt(2)) -> Tensor:
    weight = weights[f"{name}.weight"]
    he = gain / math.sqrt(weight[0].numel())
    return F.conv2d(x, weight * he, weights[f"{name}.bias"], padding=weight.shape[-1] // 2)


def unit(x: Tensor) -> Tensor:
    return x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()


def larger(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def smaller(x: Tensor) -> Tensor:
    return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4


def act(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)


def peer_discriminator(
    weights: dict[str, Tensor], x: Tensor, level: int, alpha: float, blur: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    images = x
    x = act(convolved(weights, f"from_image.{level}", images))
    for index in reversed(range(level)):
        x = act(convolved(weights, f"blocks.{index}.conv0", x))
        x = act(smaller(convolved(weights, f"blocks.{index}.conv1", blur(x))))
        if index == level - 1:
            x = (1 - alpha) * act(convolved(weights, f"from_image.{index}", smaller(images))) + alpha * x
    groups = len(x) // min(4, len(x))
    statistic = []
    for sample in range(len(x)):
        group = x[sample % groups :: groups]
        deviation = ((group - group.mean(0)).square().mean(0) + 1e-8).sqrt()
        statistic.append(deviation.mean().expand(1, 4, 4))
    x = act(convolved(weights, "conv", torch.cat([x, torch.stack(statistic)], 1)))
    for name, gain in (("dense", math.sqrt(2)), ("score", 1.0)):
        weight = weights[f"{name}.weight"]
        x = x.flatten(1) @ (weight * (gain / math.sqrt(weight.shape[1]))).T + weights[f"{name}.bias"]
        x = act(x) if name == "dense" else x
    return x[:, 0]


def assert_same_gradients(network: nn.Module, ours: Tensor, peer: Tensor) -> None:
    """Of two numbers that are differentiated, with respect to all parameters; no gradient is 0."""
    names, parameters = zip(*network.named_parameters())
    found, expected = (
        torch.autograd.grad(number, parameters, retain_graph=True, materialize_grads=True) for number in (ours, peer)
    )
    assert sum(bool(gradient.any()) for gradient in expected) >= 4
    for name, a, b in zip(names, found, expected):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
