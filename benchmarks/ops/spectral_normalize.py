"""Spectral norm of all weights of BigGAN-128's networks, against torch's own layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gdl_kernels import explain, spectral_normalize
from gdl_kernels._backends import Explanation
from gdl_kernels.ops.spectral_normalize import reference

from ..biggan import DISCRIMINATOR, GENERATOR, elements
from ..cases import OURS, Case, Contestant, Inputs, Task, short
from ..ceilings import memory_copy
from ..results import Bar, Result

NETWORKS = {"G": GENERATOR, "D": DISCRIMINATOR}

TORCH = "torch spectral_norm"
FORWARD, TRAINING = "forward", "forward+backward"

#: Gets all of a network's weights, us and vs.
Normalize = Callable[[list[Tensor], list[Tensor], list[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class Problem:
    """A network's weights, in the order of a case's inputs: weights, us, vs and, for the backward pass, gradients."""

    network: str
    mode: str
    device: torch.device
    dtype: torch.dtype

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return NETWORKS[self.network]

    def inputs(self, generator: torch.Generator) -> Inputs:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)

        weights = [random(*shape).mul_(0.02) for shape in self.shapes]
        us, vs = ([F.normalize(random(shape[i]), dim=0) for shape in self.shapes] for i in (0, 1))
        grads = [random(*shape) for shape in self.shapes] if self.mode == TRAINING else []
        return (*weights, *us, *vs, *grads)

    def parts(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        count = len(self.shapes)
        return [list(tensors[i * count : (i + 1) * count]) for i in range(4)]

    def call(self, normalize: Normalize, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs, or the gradients of the weights; vectors move on from call to call as in training."""
        weights, us, vs, grads = self.parts(tensors)
        if self.mode == FORWARD:
            with torch.no_grad():
                return tuple(normalize(weights, us, vs))
        leaves = [w.detach().requires_grad_() for w in weights]
        return torch.autograd.grad(normalize(leaves, us, vs), leaves, grads)

    def by_torch(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.call(_by_torch, *tensors)

    def by_ours(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.call(spectral_normalize, *tensors)

    def by_the_formula(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.call(_reference, *tensors)

    def apart(self, *tensors: Tensor) -> Inputs:
        """Vectors of a contestant's own, for it moves them."""
        count = len(self.shapes)
        return (*tensors[:count], *(t.clone() for t in tensors[count : 3 * count]), *tensors[3 * count :])

    def explain(self, *tensors: Tensor) -> Explanation:
        weights, us, vs, _ = self.parts(tensors)
        return explain(spectral_normalize, weights, us, vs)


def _reference(weights: list[Tensor], us: list[Tensor], vs: list[Tensor]) -> list[Tensor]:
    return reference.spectral_normalize(weights, us, vs, 1, 1e-12, "torch")[0]


def _by_torch(weights: list[Tensor], us: list[Tensor], vs: list[Tensor]) -> list[Tensor]:
    return [_one_by_torch(*one) for one in zip(weights, us, vs)]


def _one_by_torch(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """What the parametrization does on a read, call for call; the parametrization itself needs a module around it."""
    with torch.no_grad():
        F.normalize(torch.mv(weight, v), dim=0, eps=1e-12, out=u)
        F.normalize(torch.mv(weight.H, u), dim=0, eps=1e-12, out=v)
    u, v = u.clone(), v.clone()
    return weight / torch.vdot(u, torch.mv(weight, v))


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for network in ("D",) if quick else NETWORKS:
        for mode in (FORWARD,) if quick and device.type == "cpu" else (FORWARD, TRAINING):
            yield case(network, mode, device, torch.float32)
        if not quick:
            yield case(network, FORWARD, device, torch.bfloat16)


def case(network: str, mode: str, device: torch.device, dtype: torch.dtype) -> Case:
    problem = Problem(network, mode, device, dtype)
    count = elements(problem.shapes)
    size = count * dtype.itemsize
    # Forward: W is read for sigma and again to be divided. Backward: W and G are read for their inner product, and G
    # again. Each writes once.
    # An element of W is, forward, in two products with vectors (* + * +), and divided; backward in the inner product
    # (* +), and in (G - <G, W> u v^T) / sigma (* - /), where a row's factors are multiplied once.
    task = Task(
        problem.by_the_formula,
        problem.by_the_formula,
        flops=(5 if mode == FORWARD else 10) * count,
        bytes=(3 if mode == FORWARD else 7) * size,
    )
    name = f"BigGAN-128 {network}, {mode}, {short(dtype)}"
    contestants = [
        Contestant(TORCH, problem.by_torch, setup=problem.apart),
        Contestant(OURS, problem.by_ours, setup=problem.apart, explain=problem.explain),
    ]
    # One set is larger than any cache by itself.
    return Case(
        name, f"{len(problem.shapes)} matrices, {count / 1e6:.1f} M", dtype, device, problem.inputs, task,
        contestants, ceiling=memory_copy(size, 2), input_sets=2,
    )  # fmt: skip


def bars(results: Sequence[Result]) -> list[Bar]:
    asked = []
    for result in results:
        on_gpu = result.ours is not None and result.ours.backend != "cpu"
        if result.dtype == "float32":
            asked.append(
                Bar(f"{result.case}: over {TORCH}", 12.0 if on_gpu else 3.0, result.speed_up(result.row(TORCH)))
            )
        if on_gpu:
            share = result.share_of_ceiling(result.ours)
            asked.append(Bar(f"{result.case}: of the rate of a copy", 1 / 1.6, share, "%"))
    return asked
