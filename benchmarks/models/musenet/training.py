"""The loss of one excerpt and its gradients: at MuseNet's context, and at one whose scores no memory holds."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import gdl_kernels
from gdl_kernels._backends import Explanation
from models.musenet import model as musenet
from models.musenet.model import Config, MuseNet
from models.musenet.tokens import CHORALES

from ...cases import OURS, Case, Contestant, Deferred, Function, Inputs, Task
from ...results import Bar, Result
from . import plain

EAGER, SDPA, RUNS = "eager, masked", "SDPA, masked", "eager, run by run"

#: What ``python -m models compare musenet`` compares.
USUAL = Config(len(CHORALES), context=4096, layers=2, heads=8, width=512)
LONG = Config(len(CHORALES), context=65_536, layers=2, heads=2, width=64, stride=256, summary=16)
QUICK = replace(USUAL, context=512)


def cases(device: torch.device, quick: bool) -> Iterator[Deferred]:
    for config in (QUICK,) if quick else (USUAL, LONG):
        yield Deferred(_name(config), functools.partial(case, config, device))


def case(config: Config, device: torch.device) -> Case:
    torch.manual_seed(0)
    model = MuseNet(config).to(device).train()
    exact = copy.deepcopy(model).double()
    runs = plain.run_by_run(config.stride, config.summary)
    layout = model.attention[0].layout
    parameters = sum(parameter.numel() for parameter in model.parameters())
    # A multiply-add is two operations; the backward pass takes two products for each of the forward pass, and
    # attention five for its two.
    attention = 7 * 2 * layout.kept_pairs() * (config.heads // layout.heads) * (config.width // config.heads)
    flops = 6 * parameters * config.context + attention * config.layers
    # The least that can be: each weight is read and its gradient written, and activations might stay in the caches.
    moved = 2 * 4 * parameters

    def eager(tokens: Tensor) -> Tensor:
        with gdl_kernels.backend("reference"):
            return musenet.bits_per_token(model, tokens)

    def explain(*_: Tensor) -> Explanation:
        shape = 1, config.heads, config.context, config.width // config.heads
        query = torch.empty(shape, device=device)
        return gdl_kernels.explain("sparse_attention", query, query, query, layout)

    def sdpa(tokens: Tensor) -> Tensor:
        return plain.bits_per_token(model, tokens, plain.masked(layout.dense_mask()))

    by_runs = _with_gradients(model, lambda tokens: plain.bits_per_token(model, tokens, runs))
    task = Task(_with_gradients(exact, lambda tokens: plain.bits_per_token(exact, tokens, runs)), by_runs, flops, moved)
    return Case(
        name=_name(config),
        shape=f"{parameters / 1e6:.2f} M parameters, {config.layers} layers, {config.heads} heads, width "
        f"{config.width}, fixed {config.stride}/{config.summary}",
        dtype=torch.float32,
        device=device,
        inputs=functools.partial(_tokens, config.context + 1),
        task=task,
        contestants=[
            Contestant(EAGER, _where_it_fits(config, _with_gradients(model, eager), device)),
            Contestant(SDPA, _where_it_fits(config, _with_gradients(model, sdpa), device)),
            Contestant(RUNS, by_runs),
            Contestant(
                OURS, _with_gradients(model, lambda tokens: musenet.bits_per_token(model, tokens)), explain=explain
            ),
        ],
        input_sets=1,
    )


def _name(config: Config) -> str:
    return f"training, fp32, {config.context} positions"


def bars(results: Sequence[Result]) -> list[Bar]:
    asked = []
    for result in results:
        if not result.case.startswith("training"):
            continue
        ours, eager = result.ours, result.row(EAGER)
        if eager is not None and eager.status == "timed":
            memory = None
            if ours is not None and ours.peak_bytes and eager.peak_bytes:
                memory = eager.peak_bytes / ours.peak_bytes
            asked += [
                Bar(f"{result.case}: over {EAGER}", 2.5, result.speed_up(eager)),
                Bar(f"{result.case}: memory of {EAGER} over ours", 1.0, memory),
            ]
    return asked


def _tokens(count: int, generator: torch.Generator) -> Inputs:
    return (torch.randint(len(CHORALES), (1, count), generator=generator, device=generator.device),)


def _with_gradients(model: MuseNet, loss: Callable[[Tensor], Tensor]) -> Function:
    """The loss, and the gradients of all parameters on end."""
    parameters = list(model.parameters())

    def step(tokens: Tensor) -> tuple[Tensor, ...]:
        value = loss(tokens)
        gradients = torch.autograd.grad(value, parameters)
        return value.detach(), torch.cat([gradient.flatten() for gradient in gradients])

    return step


def _where_it_fits(config: Config, function: Function, device: torch.device) -> Function:
    """Refuses what the machine has no memory for, rather than be killed: every score of one layer, in float32."""
    needed = config.heads * config.context**2 * 4
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[1]
    else:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed < there:
        return function

    def refuse(*_: Tensor) -> Tensor:
        raise MemoryError(
            f"needs {needed / 1e9:.1f} GB for the scores of a layer, {needed / config.heads / 1e9:.1f} GB a head; "
            f"there are {there / 1e9:.1f} GB"
        )

    return refuse
