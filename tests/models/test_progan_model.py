"""ProGAN's networks against peers that spell out the papers' formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import gdl_kernels
from models.gans.growing import GrowingConfig
from models.gans.resampling import downsample, upsample
from models.progan.model import Discriminator, Generator
from tests.models.growing_peers import act, assert_same_gradients, convolved, larger, peer_discriminator, unit

CONFIG = GrowingConfig(size=16, channels=3, latent=12, capacity=96, widest=10)  # 10, 10 and 6 channels


def networks(seed: int = 0) -> tuple[Generator, Discriminator]:
    torch.manual_seed(seed)
    found = Generator(CONFIG).double(), Discriminator(CONFIG).double()
    for network in found:
        for parameter in network.parameters():  # biases start at 0: that would hide mistakes in them
            nn.init.normal_(parameter)
    return found


def latents(count: int = 4) -> Tensor:
    return torch.randn(count, CONFIG.latent, dtype=torch.float64)


def peer_generator(weights: dict[str, Tensor], z: Tensor, level: int, alpha: float) -> Tensor:
    dense = weights["dense.weight"]
    x = unit(z) @ (dense * (math.sqrt(2) / 4 / math.sqrt(dense.shape[1]))).T
    x = unit(act(x.view(len(z), -1, 4, 4) + weights["bias"].view(1, -1, 1, 1)))
    x = unit(act(convolved(weights, "conv", x)))
    pictures = [convolved(weights, "to_image.0", x, 1)]
    for index in range(level):
        x = unit(act(convolved(weights, f"blocks.{index}.conv0", larger(x))))
        x = unit(act(convolved(weights, f"blocks.{index}.conv1", x)))
        pictures.append(convolved(weights, f"to_image.{index + 1}", x, 1))
    return pictures[-1] if level == 0 else (1 - alpha) * larger(pictures[-2]) + alpha * pictures[-1]


@pytest.mark.parametrize(("level", "alpha"), [(0, 1.0), (1, 0.3), (1, 1.0), (2, 0.6), (2, 1.0)])
def test_the_generator_is_the_papers(level: int, alpha: float) -> None:
    generator, _ = networks()
    z = latents()
    ours, peer = generator(z, 4 << level, alpha), peer_generator(dict(generator.named_parameters()), z, level, alpha)
    torch.testing.assert_close(ours, peer, rtol=1e-9, atol=1e-11)
    assert_same_gradients(generator, ours.sin().sum(), peer.sin().sum())


def penalty(score: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """WGAN-GP's."""
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(score(images).sum(), images, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


# Batches of one group, and of two that interleave.
@pytest.mark.parametrize("batch", [3, 8])
@pytest.mark.parametrize(("level", "alpha"), [(0, 1.0), (1, 0.3), (2, 0.6), (2, 1.0)])
def test_the_discriminator_is_the_papers_up_to_its_penaltys_gradient(batch: int, level: int, alpha: float) -> None:
    _, discriminator = networks()
    weights = dict(discriminator.named_parameters())
    images = torch.randn(batch, 3, 4 << level, 4 << level, dtype=torch.float64)

    def ours(x: Tensor) -> Tensor:
        return discriminator(x, alpha)

    def peer(x: Tensor) -> Tensor:
        return peer_discriminator(weights, x, level, alpha)

    torch.testing.assert_close(ours(images), peer(images), rtol=1e-9, atol=1e-11)
    assert_same_gradients(discriminator, ours(images).sin().sum(), peer(images).sin().sum())
    penalties = penalty(ours, images), penalty(peer, images)
    torch.testing.assert_close(*penalties, rtol=1e-9, atol=1e-11)
    assert_same_gradients(discriminator, *penalties)


def test_under_the_reference_backend_it_is_the_same_model() -> None:
    generator, discriminator = networks()
    z = latents()
    ours = discriminator(generator(z))
    with gdl_kernels.backend("reference"):
        reference = discriminator(generator(z))
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


def test_a_resolution_fades_in_from_the_one_before_to_itself() -> None:
    generator, discriminator = networks()
    z = latents()
    with torch.no_grad():
        torch.testing.assert_close(generator(z, 16, 0.0), upsample(generator(z, 8)))
        torch.testing.assert_close(generator(z, 16, 1 - 1e-12), generator(z, 16), rtol=1e-9, atol=1e-9)
        images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
        torch.testing.assert_close(discriminator(images, 0.0), discriminator(downsample(images)))
        torch.testing.assert_close(discriminator(images, 1 - 1e-12), discriminator(images), rtol=1e-9, atol=1e-9)


def test_all_layers_up_to_the_newest_learn_and_none_beyond() -> None:
    generator, discriminator = networks()
    discriminator(generator(latents(), 8, 0.5), 0.5).sum().backward()
    for network in (generator, discriminator):
        for name, parameter in network.named_parameters():
            beyond = "blocks.1." in name or "image.2." in name
            assert (parameter.grad is None) is beyond, name
            if not beyond and name != "score.bias":
                assert parameter.grad is not None
                assert parameter.grad.abs().sum() > 0, name


def test_published_sizes() -> None:
    with torch.device("meta"):
        generator, discriminator = Generator(GrowingConfig()), Discriminator(GrowingConfig())
    assert GrowingConfig().widths == [512, 512, 512, 512, 256, 128, 64, 32, 16]
    assert sum(p.numel() for p in generator.parameters()) == 23_079_115  # table 2: 23.1 M each
    assert sum(p.numel() for p in discriminator.parameters()) == 23_087_249
    assert generator(torch.empty(1, 512, device="meta")).shape == (1, 3, 1024, 1024)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 2), ("size", 24), ("capacity", 8), ("latent", 0), ("widest", -1), ("channels", 2), ("group_size", 0),
        ("classes", 10),
    ],
)  # fmt: skip
def test_a_shape_that_does_not_fit_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} must .*got {value!r}"):
        replace(CONFIG, **{field: value})


def test_calls_that_do_not_fit_are_refused() -> None:
    generator, discriminator = networks()
    with pytest.raises(ValueError, match=r"^latents must have shape \(N, 12\), got \(4, 11\)"):
        generator(latents()[:, 1:])
    for resolution in (32, 2, 12):
        with pytest.raises(ValueError, match=f"^resolution must .*at least 4 and at most 16, got {resolution}"):
            generator(latents(), resolution)
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"^alpha must be from 0 to 1, got {alpha}"):
            generator(latents(), 8, alpha)
        with pytest.raises(ValueError, match=f"^alpha must be from 0 to 1, got {alpha}"):
            discriminator(torch.zeros(4, 3, 8, 8, dtype=torch.float64), alpha)
    for shape in ((4, 3, 32, 32), (4, 3, 12, 12), (4, 3, 8, 16), (4, 1, 8, 8), (4, 3, 8), (4, 3, 2, 2), (4, 3, 0, 0)):
        with pytest.raises(ValueError, match=r"^images must be \(N, 3, R, R\) with R a power of two from 4 to 16, got"):
            discriminator(torch.zeros(shape))
