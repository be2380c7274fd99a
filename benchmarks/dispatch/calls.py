"""A call of each public op on inputs so small that the kernel costs next to nothing, and of torch's ops of its form."""

from __future__ import annotations

import timeit
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import gdl_kernels as gdl
from gdl_kernels import _native, layouts
from gdl_kernels.ops.orthogonal_regularization import cpu as regularization
from gdl_kernels.ops.orthogonalize import blas as orthogonalization

Kernel = Callable[[Callable[[], Any]], float]


class Call(NamedTuple):
    """A call to be timed.

    Attributes:
        run: makes the call.
        inputs: what it can be differentiated by.
        kernel: from ``run``, the seconds that its kernel takes; None where it has none.
    """

    run: Callable[[], Any]
    inputs: Sequence[Tensor] = ()
    kernel: Kernel | None = None


def bindings(run: Callable[[], Any]) -> float:
    """Seconds in bindings of C++ kernels, which read the tensors that they are given: 60 ns for each.

    Each is called again and again where the op calls it: there the memory lives that it is given addresses of.
    """
    timed = _Timed(_native.cpu_module())
    with mock.patch.object(_native, "cpu_module", return_value=timed):
        run()
    return timed.seconds


#: Bindings that run no kernel.
NO_KERNELS = ("prefer_huge_pages",)


class _Timed:
    def __init__(self, module: ModuleType) -> None:
        self.module, self.seconds = module, 0.0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        binding = getattr(self.module, name)
        if name in NO_KERNELS:
            return binding

        def timed(*args: Any) -> Any:
            self.seconds += seconds(lambda: binding(*args))
            return binding(*args)

        return timed


def _launcher(launch: Callable[[], Any]) -> Kernel:
    """Of an op that runs on PyTorch's products: what launches them, which autograd does not see."""

    @torch.no_grad()
    def kernel(_run: Callable[[], Any]) -> float:
        return seconds(launch)

    return kernel


def seconds(run: Callable[[], Any]) -> float:
    """Of the fastest round: a round has few calls, so that nothing else interrupts the fastest."""
    return min(timeit.repeat(run, number=5, repeat=200)) / 5


#: By name, what makes a call whose inputs require a gradient or do not.
OURS: dict[str, Callable[[bool], Call]] = {}
TORCHS: dict[str, Callable[[bool], Call]] = {}


def _ours(name: str) -> Callable[[Callable[[bool], Call]], Callable[[bool], Call]]:
    return lambda make: OURS.setdefault(name, make)


def _torchs(name: str) -> Callable[[Callable[[bool], Call]], Callable[[bool], Call]]:
    return lambda make: TORCHS.setdefault(name, make)


def _images(gradient: bool) -> Tensor:
    return torch.randn(1, 4, 4, 4, requires_grad=gradient)


def _numbers(gradient: bool, *shape: int) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=gradient) for _ in range(2)]


def _unit(length: int) -> Tensor:
    return F.normalize(torch.randn(length), dim=0)


@_torchs("F.group_norm")
def _(gradient: bool) -> Call:
    x, (weight, bias) = _images(gradient), _numbers(gradient, 4)
    return Call(lambda: F.group_norm(x, 4, weight, bias), (x, weight, bias))


@_torchs("F.batch_norm")
def _(gradient: bool) -> Call:
    x, (weight, bias) = _images(gradient), _numbers(gradient, 4)
    mean, var = torch.zeros(4), torch.ones(4)
    return Call(lambda: F.batch_norm(x, mean, var, weight, bias, training=True), (x, weight, bias))


@_torchs("F.scaled_dot_product_attention")
def _(gradient: bool) -> Call:
    query, key, value = (torch.randn(1, 1, 16, 16, requires_grad=gradient) for _ in range(3))
    return Call(lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True), (query, key, value))


@_torchs("F.embedding")
def _(gradient: bool) -> Call:
    tokens, weight = torch.arange(4), torch.randn(8, 8, requires_grad=gradient)
    return Call(lambda: F.embedding(tokens, weight), (weight,))


@_ours("adain")
def _(gradient: bool) -> Call:
    x, (scale, bias) = _images(gradient), _numbers(gradient, 1, 4)
    return Call(lambda: gdl.adain(x, scale, bias), (x, scale, bias), bindings)


@_ours("adain_from_style")
def _(gradient: bool) -> Call:
    content, style = _images(gradient), _images(gradient)
    return Call(lambda: gdl.adain_from_style(content, style), (content, style), bindings)


@_ours("style_epilogue")
def _(gradient: bool) -> Call:
    x, (scale, bias), (noise_weight, channel_bias) = _images(gradient), _numbers(gradient, 1, 4), _numbers(gradient, 4)
    noise, inputs = torch.randn(1, 1, 4, 4), (x, scale, bias, noise_weight, channel_bias)

    def run() -> Tensor:
        return gdl.style_epilogue(x, scale, bias, noise=noise, noise_weight=noise_weight, channel_bias=channel_bias)

    return Call(run, inputs, bindings)


def _conditional_batch_norm(gradient: bool, training: bool) -> Call:
    x, (gain, bias), mean, var = _images(gradient), _numbers(gradient, 1, 4), torch.zeros(4), torch.ones(4)
    return Call(
        lambda: gdl.conditional_batch_norm(x, gain, bias, mean, var, training=training), (x, gain, bias), bindings
    )


@_ours("conditional_batch_norm, training")
def _(gradient: bool) -> Call:
    return _conditional_batch_norm(gradient, True)


@_ours("conditional_batch_norm, evaluation")
def _(gradient: bool) -> Call:
    return _conditional_batch_norm(gradient, False)


@_ours("pixel_norm")
def _(gradient: bool) -> Call:
    x = _images(gradient)
    return Call(lambda: gdl.pixel_norm(x), (x,), bindings)


@_ours("minibatch_stddev")
def _(gradient: bool) -> Call:
    x = _images(gradient)
    return Call(lambda: gdl.minibatch_stddev(x), (x,), bindings)


@_ours("minibatch_self_attention")
def _(gradient: bool) -> Call:
    query, key, value = (_images(gradient) for _ in range(3))
    return Call(lambda: gdl.minibatch_self_attention(query, key, value), (query, key, value), bindings)


@_ours("sparse_attention, prefill")
def _(gradient: bool) -> Call:
    query, key, value = (torch.randn(1, 1, 16, 16, requires_grad=gradient) for _ in range(3))
    layout = layouts.causal(16, block_size=16)
    return Call(lambda: gdl.sparse_attention(query, key, value, layout), (query, key, value), bindings)


@_ours("sparse_attention, decoding")
def _(gradient: bool) -> Call:
    query, key, value = (torch.randn(1, 1, n, 16, requires_grad=gradient) for n in (1, 16, 16))
    layout = layouts.causal(16, block_size=16)
    return Call(lambda: gdl.sparse_attention(query, key, value, layout, query_start=15), (query, key, value), bindings)


@_ours("merge_attention")
def _(gradient: bool) -> Call:
    outs, lses = _numbers(gradient, 1, 1, 1, 16), _numbers(gradient, 1, 1, 1)
    return Call(lambda: gdl.merge_attention(outs, lses)[0], (*outs, *lses))


@_ours("positional_embedding")
def _(gradient: bool) -> Call:
    tokens, weight = torch.arange(4), torch.randn(8, 8, requires_grad=gradient)
    return Call(lambda: gdl.positional_embedding(tokens, weight), (weight,), bindings)


def _spectral_normalize(gradient: bool, count: int) -> Call:
    weights = [torch.randn(4, 4, requires_grad=gradient) for _ in range(count)]
    us, vs = ([_unit(4) for _ in range(count)] for _ in range(2))
    return Call(lambda: gdl.spectral_normalize(weights, us, vs), weights, bindings)


@_ours("spectral_normalize, 1 weight")
def _(gradient: bool) -> Call:
    return _spectral_normalize(gradient, 1)


@_ours("spectral_normalize, 8 weights")
def _(gradient: bool) -> Call:
    return _spectral_normalize(gradient, 8)


@_ours("orthogonal_regularization")
def _(gradient: bool) -> Call:
    weights = [torch.randn(4, 4, requires_grad=gradient)]
    outputs = torch.empty(()), [torch.empty(4, 4)]  # the second is for the gradient
    launcher = _launcher(lambda: regularization.forward(outputs, weights, 1e-4, True, gradient, "cpu"))
    return Call(lambda: gdl.orthogonal_regularization(weights), weights, launcher)


@_ours("orthogonalize, 1 step")
def _(gradient: bool) -> Call:
    weights = [torch.randn(4, 4, requires_grad=gradient)]
    outputs = [torch.empty(4, 4)]
    launcher = _launcher(lambda: orthogonalization.forward(outputs, weights, 1, "polar", "cpu"))
    return Call(lambda: gdl.orthogonalize(weights, steps=1), weights, launcher)


@_ours("truncated_normal")
def _(gradient: bool) -> Call:
    return Call(lambda: gdl.truncated_normal(4, 2.0))
