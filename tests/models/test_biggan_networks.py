"""BigGAN's networks, against published counts and against their plain form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import gdl_kernels
from benchmarks import biggan as published
from models.biggan import conditioning
from models.biggan.config import BigganConfig
from models.biggan.networks import Discriminator, Generator

SMALL = BigganConfig(size=16, latent=6, width=2, embedding=3, attention_at=8, channels=1, classes=5)

#: All that differ: the size that attention is at, and whether the discriminator has it; sizes with narrow ends; depth.
CONFIGS = {
    "16": SMALL,
    "32, attention at full size": replace(SMALL, size=32, latent=8, attention_at=32),
    "no attention": replace(SMALL, attention_at=0),
    "128": replace(SMALL, size=128, latent=12, width=1, attention_at=32, channels=3),
    "deep": replace(SMALL, latent=5, deep=True),
    "deep, 128": replace(SMALL, size=128, latent=5, width=4, deep=True, attention_at=64, channels=3),
}


def on_paper(config: BigganConfig) -> tuple[Generator, Discriminator]:
    """Networks with shapes and no numbers."""
    with torch.device("meta"):
        return Generator(config, spectral_norm=False), Discriminator(config, spectral_norm=False)


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def matrices(network: nn.Module) -> list[tuple[int, int]]:
    """What has a spectral norm: all weights but the shared embedding."""
    found = [(n, p) for n, p in network.named_parameters() if p.dim() > 1 and n != "shared.weight"]
    return sorted((p.shape[0], p.shape[1:].numel()) for _, p in found)


def test_the_counts_of_128_are_the_published_ones() -> None:
    """To the parameter those of BigGAN-PyTorch, which are the paper's 70.4 and 88.0 million."""
    generator, discriminator = on_paper(BigganConfig())
    assert (count(generator), count(discriminator)) == (70_433_988, 87_982_370)
    assert matrices(generator) == sorted(published.GENERATOR)
    assert matrices(discriminator) == sorted(published.DISCRIMINATOR)


def test_the_counts_of_256_are_the_published_ones() -> None:
    """81.9 and 99.2 million in 48 and 26 matrices; of BigGAN-PyTorch's generator, whose chunks are of 17 and not 20."""
    generator, discriminator = on_paper(BigganConfig(size=256, latent=7 * 17))
    assert (len(matrices(generator)), len(matrices(discriminator))) == (48, 26)
    assert [round(published.elements(matrices(n)) / 1e6, 1) for n in (generator, discriminator)] == [81.9, 99.2]
    assert count(on_paper(BigganConfig(size=256, latent=140))[0]) == 82_235_844


def test_the_counts_of_the_deep_variant_are_the_published_ones() -> None:
    """50.4 and 34.6 million. The former has 128 colours, of which three are used."""
    generator, discriminator = on_paper(BigganConfig(width=128, latent=128, deep=True))
    unused = (128 - 3) * (9 * 128 + 1)
    assert round((count(generator) + unused) / 1e6, 1) == 50.4
    assert round(count(discriminator) / 1e6, 1) == 34.6


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_weight_but_the_embedding_is_orthogonal_and_normalised(config: BigganConfig) -> None:
    for network in (Generator(config), Discriminator(config)):
        plain = [n for n, p in network.named_parameters() if p.dim() > 1 and ".original" not in n]
        assert plain == (["shared.weight"] if isinstance(network, Generator) else [])
        layers = [m for m in network.modules() if parametrize.is_parametrized(m, "weight")]
        assert len(layers) == len(matrices(network))
        for layer in layers:
            original = layer.parametrizations.weight.original.detach().flatten(1).double()  # type: ignore[union-attr]
            values = torch.linalg.svdvals(original)
            torch.testing.assert_close(values, torch.ones_like(values), rtol=1e-4, atol=1e-4)


def plain_images(generator: Generator, latents: Tensor, classes: Tensor) -> Tensor:
    """The generator as the paper draws it: two products a norm, shortcuts after upsampling."""
    config, embedded = generator.config, generator.shared(classes)
    if config.deep:
        first = torch.cat([latents, embedded], 1)
        conditions = [first] * len(generator.blocks)
    else:
        first, *chunks = latents.split(config.latent // config.chunks, 1)
        conditions = [torch.cat([chunk, embedded], 1) for chunk in chunks]
    x = generator.linear(first).view(len(latents), -1, 4, 4)
    blocks: Any = generator.blocks
    for block, condition in zip(blocks, conditions):
        up = not config.deep or block.up
        h = x
        for place, layer in enumerate(block.layers):
            h = F.relu(layer.norm(h, condition))
            if up and place == (1 if config.deep else 0):
                h = F.interpolate(h, scale_factor=2)
            h = layer.convolution(h)
        shortcut = F.interpolate(x, scale_factor=2) if up else x
        shortcut = shortcut[:, : h.shape[1]] if config.deep else block.shortcut(shortcut)
        grown = shortcut.shape[-1] > x.shape[-1]
        x = h + shortcut
        if config.attention_at == x.shape[-1] and grown and generator.attention is not None:
            x = generator.attention(x)
    norm = generator.norm
    x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, 0.1, norm.eps)
    return generator.to_image(F.relu(x)).tanh()


def plain_scores(discriminator: Discriminator, images: Tensor, classes: Tensor) -> Tensor:
    """The discriminator as the paper draws it: shortcuts before pooling."""
    config = discriminator.config
    x = discriminator.from_image(images)
    blocks: Any = discriminator.blocks
    for number, block in enumerate(blocks):
        h = x if number == 0 and not config.deep else F.relu(x)
        for place, convolution in enumerate(block.convolutions):
            h = F.relu(h) if place else h
            h = F.avg_pool2d(h, 2) if config.deep and place == 3 and block.down else h
            h = convolution(h)
        if config.deep:
            x = F.avg_pool2d(x, 2) if block.down else x
            x = h + (x if block.appended is None else torch.cat([x, block.appended(x)], 1))
        else:
            both = h + block.shortcut(x)
            x = F.avg_pool2d(both, 2) if block.down else both
        last = number + 1 == len(blocks) or (number % 2 == 1 if config.deep else True)
        if config.attention_at == x.shape[-1] and last and discriminator.attention is not None:
            x = discriminator.attention(x)
    features = F.relu(x).flatten(2).sum(2)
    return (discriminator.linear(features) + (features * discriminator.projection(classes)).sum(1, keepdim=True))[:, 0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_networks_are_those_of_the_paper(config: BigganConfig, training: bool) -> None:
    generator, discriminator = Generator(config).double(), Discriminator(config).double()
    with torch.no_grad():
        for network in (generator, discriminator):
            for name, parameter in network.named_parameters():
                if name.endswith(("bias", "gamma", "norm.weight")):
                    parameter.normal_()
    for network in (generator, discriminator):
        # The plain form takes each weight by itself: no step of the power method must come in between.
        gdl_kernels.remove_spectral_norm_all(network.eval()).train(training)
    latents, classes = torch.randn(3, config.latent, dtype=torch.float64), torch.tensor([0, 4, 4])
    images = generator(latents, classes)
    assert images.shape == (3, config.channels, config.size, config.size)
    with gdl_kernels.backend("reference"):
        torch.testing.assert_close(images, plain_images(generator, latents, classes))
        torch.testing.assert_close(discriminator(images, classes), plain_scores(discriminator, images, classes))
    assert (generator.attention is None) == (config.attention_at == 0)
    assert (discriminator.attention is None) == (config.attention_at in (0, config.size))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_reach_every_parameter(config: BigganConfig) -> None:
    # In eval mode: a batch's own statistics would take away the biases before them, whose gradients would be rounding.
    generator, discriminator = Generator(config).eval(), Discriminator(config)
    with torch.no_grad():
        for network in (generator, discriminator):
            for name, parameter in network.named_parameters():
                if name.endswith("gamma"):
                    parameter.fill_(1.0)
    classes = torch.tensor([1, 0, 3])
    discriminator(generator(torch.randn(3, config.latent), classes), classes).square().sum().backward()
    for network in (generator, discriminator):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(("config", "products"), [(CONFIGS["128"], 5), (CONFIGS["deep, 128"], 1)])
def test_gains_and_biases_take_few_products(
    monkeypatch: pytest.MonkeyPatch, config: BigganConfig, products: int
) -> None:
    """One for each chunk of the noise, of 20 weights; one for all 80 of the deep variant."""
    generator, calls = Generator(config), []

    def counted(x: Tensor, weight: Tensor) -> Tensor:
        calls.append(weight.shape)
        return F.linear(x, weight)

    class Functional:
        linear = staticmethod(counted)

    monkeypatch.setattr(conditioning, "F", Functional)
    generator(torch.randn(2, config.latent), torch.tensor([0, 1]))
    assert len(calls) == products
    norms = [m for m in generator.modules() if isinstance(m, gdl_kernels.nn.ConditionalBatchNorm2d)]
    assert sum(rows for rows, _ in calls) == sum(2 * norm.num_features for norm in norms)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_last_batch_norm_is_torchs(momentum: float | None) -> None:
    ours, theirs = conditioning.BatchNorm2d(3, momentum=momentum), nn.BatchNorm2d(3, momentum=momentum)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
    theirs.load_state_dict(ours.state_dict())
    for training in (True, True, False):
        x = 2 * torch.randn(4, 3, 5, 5) + 1
        results = [norm.train(training)(x) for norm in (ours, theirs)]
        torch.testing.assert_close(*results)
        for result in results:
            result.square().sum().backward()
        torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    for one, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_a_class_may_be_given_embedded() -> None:
    generator = Generator(SMALL).eval()
    latents, classes = torch.randn(2, 6), torch.tensor([2, 3])
    images = generator(latents, classes)
    torch.testing.assert_close(generator(latents, generator.shared(classes)), images)
    between = generator(latents, generator.shared(classes).mean(0).expand(2, -1))
    assert (between - images).abs().max() > 1e-4


def test_bad_input() -> None:
    generator, discriminator = Generator(SMALL), Discriminator(SMALL)
    latents, classes = torch.randn(2, 6), torch.tensor([0, 1])
    for call, message in (
        (lambda: generator(torch.randn(2, 7), classes), r"latents must have shape \(N, 6\), got \(2, 7\)"),
        (lambda: generator(latents, torch.tensor([0, 5])), "labels must be from 0 to 4, got 0 to 5"),
        (lambda: generator(latents, torch.tensor([-1, 0])), "labels must be from 0 to 4, got -1 to 0"),
        (lambda: generator(latents, torch.randn(2, 4)), r"embedded classes must be \(2, 3\), got shape \(2, 4\)"),
        (lambda: generator(latents, torch.tensor([0])), r"labels must be integers of shape \(2,\)"),
        (lambda: discriminator(torch.randn(2, 3, 16, 16), classes), r"images must have shape \(N, 1, 16, 16\)"),
        (lambda: discriminator(torch.randn(2, 1, 16, 16), torch.tensor([0, 7])), "labels must be from 0 to 4"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 48}, "size must be one of 16, 32, 64, 128, 256, 512, got 48"),
        ({"size": 8}, "size must be one of 16, 32, 64, 128, 256, 512, got 8"),
        ({"size": 1024}, "size must be one of 16, 32, 64, 128, 256, 512, got 1024"),
        ({"latent": 7}, "latent must be a multiple of 3, the chunks at size 16, got 7"),
        ({"classes": 0}, "classes must be at least 1, got 0"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"embedding": -1}, "embedding must be at least 1, got -1"),
        ({"attention_at": 4}, "attention_at must be one of 0, 8, 16 at size 16, got 4"),
        ({"deep": True, "size": 128, "attention_at": 64}, "width must be at least 4 for bottleneck blocks, got 2"),
        ({"penalty": float("inf")}, "penalty must be finite and not negative, got inf"),
        ({"penalty": -1.0}, "penalty must be finite and not negative, got -1.0"),
        ({"gram": "both"}, "gram must be columns or rows, got 'both'"),
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
        ({"channels": 2}, "channels must be 1 or 3, got 2"),
    ],
)
def test_bad_configurations(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)
