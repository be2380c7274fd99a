"""Generators of pytorch-pretrained-biggan in ours: random weights, nothing is downloaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.biggan.pretrained import PretrainedGenerator

package = pytest.importorskip(
    "pytorch_pretrained_biggan", reason="pytorch-pretrained-biggan is not installed (pip install -e '.[dev]')"
)

#: Its blocks as released, by resolution: whether they upsample, and channels over the width.
LAYERS = {
    128: [(False, 16, 16), (True, 16, 16), (False, 16, 16), (True, 16, 8), (False, 8, 8), (True, 8, 4), (False, 4, 4),
          (True, 4, 2), (False, 2, 2), (True, 2, 1)],
    256: [(False, 16, 16), (True, 16, 16), (False, 16, 16), (True, 16, 8), (False, 8, 8), (True, 8, 8), (False, 8, 8),
          (True, 8, 4), (False, 4, 4), (True, 4, 2), (False, 2, 2), (True, 2, 1)],
    512: [(False, 16, 16), (True, 16, 16), (False, 16, 16), (True, 16, 8), (False, 8, 8), (True, 8, 8), (False, 8, 8),
          (True, 8, 4), (False, 4, 4), (True, 4, 2), (False, 2, 2), (True, 2, 1), (False, 1, 1), (True, 1, 1)],
}  # fmt: skip


def peer(resolution: int, width: int = 4) -> Any:
    """The package's generator with weights and statistics of which none is what it begins as."""
    config = package.BigGANConfig(
        output_dim=resolution, z_dim=6, class_embed_dim=6, channel_width=width, num_classes=5,
        layers=LAYERS[resolution], attention_layer_position=8,
    )  # fmt: skip
    model = package.BigGAN(config)
    with torch.no_grad():
        for module in model.train().modules():
            for hook in module._forward_pre_hooks.values():  # steps of the power method: sigma begins as anything
                for _ in range(5):
                    hook(module, ())
        for name, tensor in model.state_dict().items():
            if name.endswith("running_vars"):
                tensor.uniform_(0.5, 2)
            elif name.endswith(("running_means", "bias", "gamma", "generator.bn.weight")):
                tensor.normal_()
    return model.double().eval()


def images(model: nn.Module, z: Tensor, classes: Tensor, truncation: float) -> Tensor:
    with torch.no_grad():
        return model(z, nn.functional.one_hot(classes, 5).double(), truncation)


@pytest.mark.parametrize("resolution", LAYERS)
def test_weights_give_the_packages_images(resolution: int) -> None:
    theirs = peer(resolution)
    ours = PretrainedGenerator(theirs.state_dict())
    assert (ours.generator.config.size, ours.generator.config.attention_at) == (resolution, 64)
    z, classes = torch.randn(2, 6, dtype=torch.float64), torch.tensor([4, 1])
    with torch.no_grad():
        drawn = ours(z, classes, 0.4)
    assert drawn.shape == (2, 3, resolution, resolution)
    torch.testing.assert_close(drawn, images(theirs, z, classes, 0.4), rtol=1e-9, atol=1e-9)


def test_statistics_are_those_of_the_truncation() -> None:
    """At a place of the table, between two, where the package's rounding puts 0.58 between two, and at the end."""
    theirs = peer(128)
    ours = PretrainedGenerator(theirs.state_dict())
    z, classes = torch.randn(1, 6, dtype=torch.float64), torch.tensor([0])
    drawn = {}
    for truncation in (0.5, 0.411, 0.58, 1.0, 0.005):
        with torch.no_grad():
            drawn[truncation] = ours(z, classes, truncation)
        torch.testing.assert_close(drawn[truncation], images(theirs, z, classes, truncation), rtol=1e-9, atol=1e-9)
    assert (drawn[0.5] - drawn[0.411]).abs().max() > 0.01


def test_what_is_not_such_a_generator_is_refused() -> None:
    state = peer(128).state_dict()
    for wrong, message in (
        ({}, "embeddings.weight"),
        ({name: t for name, t in state.items() if name != "generator.layers.3.conv_2.bias"}, "convolution.bias"),
        (state | {"generator.conv_to_rgb.bias": torch.zeros(2)}, "size mismatch for to_image.bias"),
        (state | {"discriminator.bias": torch.zeros(2)}, "discriminator"),
    ):
        with pytest.raises(ValueError, match="state must be a generator's of pytorch-pretrained-biggan") as raised:
            PretrainedGenerator(wrong)
        assert message in str(raised.value)
    ours = PretrainedGenerator(state)
    for truncation in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"truncation must be above 0 and at most 1, got {truncation}"):
            ours(torch.randn(1, 6, dtype=torch.float64), torch.tensor([0]), truncation)
    with pytest.raises(ValueError, match="labels must be from 0 to 4, got 5"):
        ours(torch.randn(1, 6, dtype=torch.float64), torch.tensor([5]), 0.5)
