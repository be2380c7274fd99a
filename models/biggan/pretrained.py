"""Generators of ``pytorch-pretrained-biggan`` in ours.

That package has BigGAN-deep's generators of 128, 256 and 512 pixels, converted from their authors'. This reads the
state dict that its ``pytorch_model.bin`` is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gdl_kernels.nn import ConditionalBatchNorm2d

from .conditioning import BatchNorm2d
from .config import BASE, MULTIPLES, BigganConfig
from .networks import Generator

#: What its config has; the weights do not tell.
EPS = 1e-4


class PretrainedGenerator(nn.Module):
    """A generator of BigGAN-deep with released weights: noise, classes and a truncation to images.

    Weights are kept as the layers read them, divided by their largest singular value: they are to sample with. To train
    them on, give :attr:`generator` a spectral norm again.

    The running statistics of each batch norm were gathered for truncations 0, 0.02, ... 1. Between two of them the
    package gives the nearer one the smaller weight. So does this, for its images are to be the same.

    Args:
        state: the package's state dict.
        eps: its config's.

    Attributes:
        generator: the generator, in eval mode.

    Raises:
        ValueError: if ``state`` is not that of such a generator; when called, if ``truncation`` is not above 0 and at
            most 1, and what the generator refuses.
    """

    statistics: Tensor

    def __init__(self, state: Mapping[str, Tensor], *, eps: float = EPS) -> None:
        super().__init__()
        try:
            with torch.device("meta"):  # its own weights are not wanted
                self.generator = Generator(_config(state, eps), spectral_norm=False).eval()
            self.generator.load_state_dict(_converted(state), assign=True)
            # (2, truncations, channels of all batch norms): means and variances.
            statistics = torch.cat([_statistics(state, theirs) for theirs in _norms(state)], -1)
        except (KeyError, IndexError, RuntimeError) as error:
            raise ValueError(f"state must be a generator's of pytorch-pretrained-biggan: {error}") from error
        self.register_buffer("statistics", statistics)

    def forward(self, latents: Tensor, classes: Tensor, truncation: float) -> Tensor:
        if not 0 < truncation <= 1:
            raise ValueError(f"truncation must be above 0 and at most 1, got {truncation}")
        # With the package's rounding, which decides what is a place of its own: 0.58 is not.
        fraction, place = math.modf(truncation / (1.0 / (self.statistics.shape[1] - 1)))
        found = self.statistics[:, int(place)]
        if fraction:
            found = fraction * found + (1 - fraction) * self.statistics[:, int(place) + 1]
        # Any: what these two have in common has no name.
        kinds = (ConditionalBatchNorm2d, BatchNorm2d)
        norms: list[Any] = [module for module in self.generator.modules() if isinstance(module, kinds)]
        for norm, (mean, var) in zip(norms, found.split([norm.num_features for norm in norms], -1)):
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
        return self.generator(latents, classes)


def _config(state: Mapping[str, Tensor], eps: float) -> BigganConfig:
    latent, classes = state["embeddings.weight"].shape
    blocks, attention = _layers(state)
    outputs, _ = state["generator.gen_z.weight_orig"].shape
    size = BASE * 2 ** (blocks.index(attention + 1) // 2)  # two blocks at each size
    return BigganConfig(
        size=BASE * 2 ** (len(blocks) // 2), width=outputs // BASE**2 // MULTIPLES[128][0], classes=classes,
        latent=latent, embedding=latent, attention_at=size, deep=True, eps=eps,
    )  # fmt: skip


def _layers(state: Mapping[str, Tensor]) -> tuple[list[int], int]:
    """Which of the package's layers are blocks, and which is attention."""
    found = {int(match[1]) for name in state if (match := re.match(r"generator\.layers\.(\d+)\.", name))}
    attention = [layer for layer in found if f"generator.layers.{layer}.gamma" in state]
    return sorted(found.difference(attention)), attention[0]


def _norms(state: Mapping[str, Tensor]) -> list[str]:
    """The package's batch norms, in the order in which our generator has them."""
    blocks, _ = _layers(state)
    return [*(f"generator.layers.{layer}.bn_{place}" for layer in blocks for place in range(4)), "generator.bn"]


def _statistics(state: Mapping[str, Tensor], norm: str) -> Tensor:
    return torch.stack([state[f"{norm}.running_means"], state[f"{norm}.running_vars"]])


def _converted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The package's weights as ours, normalised, and running statistics for truncation 1."""
    blocks, _ = _layers(state)
    weights = {}
    for name, tensor in state.items():
        module, _, part = name.rpartition(".")
        if part == "weight_orig":
            sigma = state[f"{module}.weight_u"] @ tensor.flatten(1) @ state[f"{module}.weight_v"]
            weights[f"{_ours(module, blocks)}.weight"] = tensor / sigma
        elif part in ("bias", "gamma") or (part == "weight" and f"{module}.weight_orig" not in state):
            weights[f"{_ours(module, blocks)}.{part}"] = tensor.clone()
        elif part in ("running_means", "running_vars"):
            weights[f"{_ours(module, blocks)}.{part.removesuffix('s')}"] = tensor[-1].clone()
            weights[f"{_ours(module, blocks)}.num_batches_tracked"] = torch.tensor(0)
    weights["shared.weight"] = weights["shared.weight"].T.contiguous()
    for part in ("weight", "bias"):
        linear = weights[f"linear.{part}"]  # its outputs are (pixels, channels) there, (channels, pixels) here
        weights[f"linear.{part}"] = linear.unflatten(0, (BASE**2, -1)).transpose(0, 1).flatten(0, 1)
        # It has an output for each of its channels, and uses three.
        weights[f"to_image.{part}"] = weights[f"to_image.{part}"][:3].clone()
    return weights


def _ours(module: str, blocks: list[int]) -> str:
    """What one of the package's modules is called here."""
    if match := re.fullmatch(r"generator\.layers\.(\d+)\.(bn|conv)_(\d)(\.scale|\.offset)?", module):
        layer, kind, place, of_norm = match.groups()
        part = {"bn": "norm", "conv": "convolution"}[kind]
        return f"blocks.{blocks.index(int(layer))}.layers.{place}.{part}" + {
            None: "", ".scale": ".gain", ".offset": ".bias"
        }[of_norm]  # fmt: skip
    if match := re.fullmatch(r"generator\.layers\.\d+(\.snconv1x1_\w+)?", module):
        return f"attention{match[1] or ''}"  # which reads these names
    names = {
        "embeddings": "shared",
        "generator.gen_z": "linear",
        "generator.bn": "norm",
        "generator.conv_to_rgb": "to_image",
    }
    return names[module]
