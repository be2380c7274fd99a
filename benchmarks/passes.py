"""Which passes of a function are timed: forward, backward, or both."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .cases import Contestant, Function, Inputs, Task


@dataclass(frozen=True)
class Passes:
    """A backward pass is a function of one more input, the last: the gradient of the output.

    Integers among the inputs are not differentiated by.
    """

    name: str
    forward: bool
    backward: bool

    def of(self, function: Function) -> Function:
        """The passes as one function of a case's inputs."""
        if not self.backward:
            return function
        step = functools.partial(_step, function)
        return step if self.forward else lambda *inputs: step(*inputs)[1:]

    def contestant(self, name: str, function: Function, task: Task | None = None) -> Contestant:
        if self.forward:
            return Contestant(name, self.of(function), task=task)
        return Contestant(name, _gradients, setup=functools.partial(_graph, function), task=task)


def _graph(function: Function, *inputs: Tensor) -> Inputs:
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs[:-1]]
    out = function(*leaves)
    assert isinstance(out, Tensor)
    return out, *leaves, inputs[-1]


def _gradients(out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [t for t in inputs[:-1] if t.requires_grad]
    return torch.autograd.grad(out, leaves, inputs[-1], retain_graph=True)


def _step(function: Function, *inputs: Tensor) -> tuple[Tensor, ...]:
    graph = _graph(function, *inputs)
    return graph[0].detach(), *_gradients(*graph)
