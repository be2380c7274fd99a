"""One more token of a piece, at growing lengths: what has been played is in a cache, or computed anew."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import gdl_kernels
from gdl_kernels._backends import Explanation
from gdl_kernels.nn import KeyValueCache
from models.musenet.model import Config, MuseNet
from models.musenet.tokens import CHORALES

from ...cases import OURS, Case, Contestant, Deferred, Function, Inputs, Task
from ...ceilings import memory_read
from ...results import Bar, Result, curve
from .plain import Attention, DenseCache, dense, kept_keys, last_logits, masked, run_by_run

DENSE, EAGER, SDPA = "dense, cached", "recomputed, eager", "recomputed, SDPA"
POSITIONS = (256, 1024, 2048, 4096, 8192, 16_384)
QUICK_POSITIONS = (1024,)
#: Computing all positions anew takes a second for a token from here on, and four times that at twice as many.
RECOMPUTED = 2048
#: The Sparse Transformer's widest summary, which is `--preset small`'s, and its narrowest.
SUMMARIES = (32, 8)


def cases(device: torch.device, quick: bool) -> Iterator[Deferred]:
    for summary in SUMMARIES[:1] if quick else SUMMARIES:
        config = Config(len(CHORALES), context=max(POSITIONS), layers=4, heads=8, width=512, summary=summary)
        model = functools.cache(functools.partial(_model, config, device))
        for positions in QUICK_POSITIONS if quick else POSITIONS:
            yield Deferred(_name(config, positions), functools.partial(case, model, positions))


def _model(config: Config, device: torch.device) -> MuseNet:
    torch.manual_seed(0)
    return MuseNet(config).eval().to(device)


def _name(config: Config, positions: int) -> str:
    return f"decoding, summary {config.summary}, fp32, {positions} positions"


def case(built: Callable[[], MuseNet], positions: int) -> Case:
    """The token at ``positions - 1``, after all those before it."""
    model = built()
    config, weight = model.config, model.embedding.weight
    exact = copy.deepcopy(model).double()
    attention = run_by_run(config.stride, config.summary)
    last = positions - 1
    begin = last // config.stride * config.stride
    kept = kept_keys(config.heads, begin, positions, config.stride, config.summary).numel()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    work = kept * (config.width // config.heads) * config.layers
    count = (parameters + 2 * work) * weight.dtype.itemsize
    contestants = [_dense(model, exact, positions), _ours(model, positions)]
    if positions <= RECOMPUTED:
        contestants = [*_recomputed(model, positions), *contestants]
    return Case(
        name=_name(config, positions),
        shape=f"{parameters / 1e6:.1f} M parameters, {config.layers} layers, {kept // config.heads} keys kept a head",
        dtype=weight.dtype,
        device=weight.device,
        inputs=functools.partial(_tokens, positions),
        task=Task(
            _inferred(exact, attention), _inferred(model, attention), flops=2 * parameters + 4 * work, bytes=count
        ),
        contestants=contestants,
        ceiling=memory_read(count, 1),
        growth=(f"decoding, summary {config.summary}, fp32 over positions", positions),
        input_sets=1,  # as in a piece: each token finds weights and cache where the one before it left them
        recorded=False,
    )


def bars(results: Sequence[Result]) -> list[Bar]:
    asked = []
    for result in results:
        name, positions = result.growth or ("", 0)
        if not name.startswith("decoding"):
            continue
        asked += [
            Bar(f"{result.case}: over {row.contestant}", 3.0, result.speed_up(row))
            for row in result.rows if row.contestant in (EAGER, SDPA)
        ]  # fmt: skip
        if least := {1024: 1.0, 16_384: 2.0}.get(positions):
            asked.append(Bar(f"{result.case}: over {DENSE}", least, result.speed_up(result.row(DENSE))))
    for name in dict.fromkeys(result.growth[0] for result in results if result.growth):
        times = {n: row.median_ms for n, result in curve(results, name) if (row := result.ours) and row.median_ms}
        if name.startswith("decoding") and 1024 in times and 16_384 in times:
            share, what = times[1024] / times[16_384], name.partition(" over ")[0]
            asked.append(Bar(f"{what}: tokens a second at 16,384 positions, of those at 1,024", 0.5, share, "%"))
    return asked


def _tokens(positions: int, generator: torch.Generator) -> Inputs:
    return (torch.randint(len(CHORALES), (1, positions), generator=generator, device=generator.device),)


def _inferred(model: MuseNet, attention: Attention) -> Function:
    return torch.inference_mode()(lambda tokens: last_logits(model, tokens, attention))


def _ours(model: MuseNet, positions: int) -> Contestant:
    cache: list[KeyValueCache] = []

    @torch.inference_mode()
    def played(tokens: Tensor) -> Inputs:
        cache[:] = model.cache()
        model(tokens[:, :-1], cache)
        return (tokens[:, -1:],)

    @torch.inference_mode()
    def step(token: Tensor) -> Tensor:
        for layer in cache:
            layer.reset(positions - 1)
        return model(token, cache)[:, -1]

    def explain(*_: Tensor) -> Explanation:
        heads, head_dim = model.config.heads, model.config.width // model.config.heads
        query, key = (model.embedding.weight.new_empty(1, heads, n, head_dim) for n in (1, positions))
        layout = model.attention[0].layout
        return gdl_kernels.explain("sparse_attention", query, key, key, layout, query_start=positions - 1)

    return Contestant(OURS, step, explain=explain, setup=played)


def _dense(model: MuseNet, exact: MuseNet, positions: int) -> Contestant:
    """Keeps every position: another function, so a yardstick, checked against its own truth."""
    cache = DenseCache(model, positions)

    @torch.inference_mode()
    def played(tokens: Tensor) -> Inputs:
        cache.length = 0
        cache.next_logits(model, tokens[:, :-1])
        return (tokens[:, -1:],)

    @torch.inference_mode()
    def step(token: Tensor) -> Tensor:
        cache.length = positions - 1
        return cache.next_logits(model, token)

    pairs = positions * model.config.width * model.config.layers
    parameters = sum(parameter.numel() for parameter in model.parameters())
    task = Task(
        _inferred(exact, dense), _inferred(model, dense), flops=2 * parameters + 4 * pairs,
        bytes=(parameters + 2 * pairs) * model.embedding.weight.dtype.itemsize,
    )  # fmt: skip
    return Contestant(DENSE, step, task=task, setup=played)


def _recomputed(model: MuseNet, positions: int) -> list[Contestant]:
    """Without a cache, the logits of the last position alone."""

    @torch.inference_mode()
    def eager(tokens: Tensor) -> Tensor:
        with gdl_kernels.backend("reference"):
            return model(tokens)[:, -1]

    mask = model.attention[0].layout.dense_mask()[:, :positions, :positions]
    return [Contestant(EAGER, eager), Contestant(SDPA, _inferred(model, masked(mask)))]
