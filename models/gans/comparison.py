"""A GAN's generator and discriminator together, as :mod:`models.compare` wants them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gdl_kernels
from gdl_kernels._backends import Choices, Explanation, explain, picking_anew

from ..compare import Problem
from .data import Batch, Batches, open_images
from .model import Config, Gan, memory_format


def real_images(data: str, config: Config, batch: int, *, grey: bool, conditional: bool, seed: int) -> Batch:
    """The first batch of the data, at the model's full size."""
    images = open_images(data, config.size, grey=grey)
    config.check_data(images, conditional=conditional)
    pixels, labels = next(Batches(images, batch, seed))
    return Batch(pixels, labels if config.classes else None)


def problem(
    gan: type[Gan],
    config: Config,
    real: Batch,
    dtype: torch.dtype,
    device: str,
    seed: int,
) -> Problem:
    """The same model and input at every call, in training mode.

    The output is the generator's images with their scores. The loss is that of a step: the discriminator's, with
    penalties, then the generator's, so each network's gradients are those that its optimiser would see.
    """
    torch.manual_seed(seed)
    with gdl_kernels.backend("reference"):  # new spectral norms take steps of the power method: the same on both sides
        model = gan(config).placed(device, dtype).train()
    latents = model.latents(len(real.images)).to(device=device, dtype=dtype)
    labels = model.labels(len(real.images))
    labels = None if labels is None else labels.to(device)
    images = real.images.to(device, dtype, memory_format=memory_format(device))
    shown = Batch(images, None if real.labels is None else real.labels.to(device))

    def forward() -> Tensor:
        torch.manual_seed(seed)
        fake = model.fakes(latents, labels)
        return torch.cat([fake.images.flatten(1), model.score(fake)[:, None]], 1)

    def loss() -> Tensor:
        torch.manual_seed(seed)  # noise and the places of penalties are the same on both sides, at every step
        with torch.no_grad():
            fake = model.fakes(latents, labels)
        of_discriminator = torch.stack(list(model.discriminator_terms(model.reals(shown), fake).values())).sum()
        of_discriminator.backward()  # at once, as in training: the graph is gone before the generator's is made
        model.discriminator.requires_grad_(False)
        of_generator = torch.stack(list(model.generator_terms(model.fakes(latents, labels)).values())).sum()
        model.discriminator.requires_grad_(True)
        return of_discriminator.detach() + of_generator

    def explanations() -> list[Explanation]:
        few = Batch(shown.images[:2], None if shown.labels is None else shown.labels[:2])
        with torch.no_grad():
            return observed(lambda: (model.fakes(latents[:2], few.labels), model.score(few)))

    return Problem(model, forward, loss, explanations)


def observed(call: Callable[[], Any]) -> list[Explanation]:
    """Who serves each of our ops that a call makes: of an op's calls the first, or one that no kernel serves."""
    found: dict[str, Explanation] = {}
    pick = Choices.pick

    def noted(self: Choices, device: torch.device, requested: str | None, *args: Any, **kwargs: Any) -> str:
        chosen = pick(self, device, requested, *args, **kwargs)
        if not explaining and (self.op not in found or chosen == "reference"):
            explaining.append(self.op)  # which asks again who is picked
            found[self.op] = explain(self.op, *args, backend=requested, **kwargs)
            explaining.clear()
        return chosen

    explaining: list[str] = []
    Choices.pick = noted  # type: ignore[method-assign]
    try:
        with picking_anew():
            call()
    finally:
        Choices.pick = pick  # type: ignore[method-assign]
    return list(found.values())
