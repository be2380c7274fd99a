"""StyleGAN's networks against peers that spell out the formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gdl_kernels
from models.gans.resampling import downsample, upsample
from models.progan.model import Discriminator
from models.stylegan.model import Generator, StyleganConfig, layers_at, mix
from tests.models.growing_peers import act, assert_same_gradients, larger, peer_discriminator

CONFIG = StyleganConfig(
    size=16, channels=3, latent=12, capacity=96, widest=10, style=9, mapping_layers=3
)  # 10, 10 and 6 channels


def networks(seed: int = 0) -> tuple[Generator, Discriminator]:
    torch.manual_seed(seed)
    found = Generator(CONFIG).double(), Discriminator(CONFIG, blur=True).double()
    for network in found:
        for name, parameter in network.named_parameters():  # biases and the noise's weights start at 0
            if not name.startswith("mapping"):
                nn.init.normal_(parameter)
    for layer in found[0].mapping.layers:
        nn.init.normal_(layer.bias, std=50)
    return found


def latents(count: int = 4) -> Tensor:
    return torch.randn(count, CONFIG.latent, dtype=torch.float64)


def blurred(x: Tensor) -> Tensor:
    line = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype)
    kernel = torch.outer(line, line).repeat(x.shape[1], 1, 1, 1)
    return F.conv2d(x, kernel, padding=1, groups=x.shape[1])


def peer_mapping(weights: dict[str, Tensor], z: Tensor) -> Tensor:
    x = z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt()
    for index in range(CONFIG.mapping_layers):
        weight, bias = weights[f"mapping.layers.{index}.weight"], weights[f"mapping.layers.{index}.bias"]
        x = act(x @ (weight * (0.01 * math.sqrt(2 / weight.shape[1]))).T + 0.01 * bias)
    return x


def peer_synthesis(weights: dict[str, Tensor], styles: Tensor, alpha: float, noise: list[Tensor]) -> Tensor:
    weights = {name.removeprefix("synthesis."): weight for name, weight in weights.items()}
    x = weights["constant"].repeat(len(styles), 1, 1, 1)
    pictures = []
    for index in range(styles.shape[1]):
        name = f"layers.{index}."
        if index > 0:
            kernel = weights[name + "convolution.weight"]
            doubles = index % 2 == 0
            x = F.conv2d(larger(x) if doubles else x, kernel * math.sqrt(2 / kernel[0].numel()), padding=1)
            x = blurred(x) if doubles else x
        x = x + weights[name + "noise_weight"].view(1, -1, 1, 1) * noise[index]
        x = act(x + weights[name + "channel_bias"].view(1, -1, 1, 1))
        x = x - x.mean((2, 3), keepdim=True)
        x = x / (x.square().mean((2, 3), keepdim=True) + 1e-8).sqrt()
        affine = weights[name + "affine.weight"]
        style = styles[:, index] @ (affine / math.sqrt(affine.shape[1])).T + weights[name + "affine.bias"]
        scale, bias = style.view(len(x), 2, -1, 1, 1).unbind(1)
        x = (scale + 1) * x + bias
        if index % 2:
            picture = weights[f"to_image.{index // 2}.weight"]
            picture = F.conv2d(x, picture / math.sqrt(picture.shape[1]), weights[f"to_image.{index // 2}.bias"])
            pictures.append(picture)
    return (1 - alpha) * larger(pictures[-2]) + alpha * pictures[-1]


@pytest.mark.parametrize(("resolution", "alpha"), [(8, 1.0), (16, 0.3), (16, 1.0)])
def test_the_generator_is_the_papers(resolution: int, alpha: float) -> None:
    generator, _ = networks()
    weights, z, noise = dict(generator.named_parameters()), latents(), generator.noise(4, resolution)
    styles = peer_mapping(weights, z)[:, None].repeat(1, layers_at(resolution), 1)
    torch.testing.assert_close(generator.styles(z, resolution), styles, rtol=1e-9, atol=1e-11)
    ours, peer = generator(z, resolution, alpha, noise=noise), peer_synthesis(weights, styles, alpha, noise)
    torch.testing.assert_close(ours, peer, rtol=1e-9, atol=1e-10)
    assert_same_gradients(generator, ours.sin().sum(), peer.sin().sum())


def test_gradients_of_the_generators_gradient_are_those_of_the_formulas() -> None:
    """The length of the images' gradient with respect to the styles, as later StyleGANs keep it even."""
    generator, _ = networks()
    weights, noise = dict(generator.named_parameters()), generator.noise(3)
    direction = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    lengths = []
    for synthesize in (generator.synthesis, lambda *given: peer_synthesis(weights, *given)):
        styles = generator.styles(latents(3).fill_(1).cumsum(0).cos())
        (gradient,) = torch.autograd.grad((synthesize(styles, 1.0, noise) * direction).sum(), styles, create_graph=True)
        lengths.append(gradient.square().sum((1, 2)).sqrt().sum())
    torch.testing.assert_close(*lengths, rtol=1e-9, atol=1e-10)
    assert_same_gradients(generator, *lengths)


@pytest.mark.parametrize("batch", [3, 8])
@pytest.mark.parametrize(("resolution", "alpha"), [(8, 1.0), (16, 0.6), (16, 1.0)])
def test_the_discriminator_is_the_papers_up_to_r1s_gradient(batch: int, resolution: int, alpha: float) -> None:
    _, discriminator = networks()
    weights, level = dict(discriminator.named_parameters()), layers_at(resolution) // 2 - 1
    images = torch.randn(batch, 3, resolution, resolution, dtype=torch.float64, requires_grad=True)
    scores = discriminator(images, alpha), peer_discriminator(weights, images, level, alpha, blurred)
    torch.testing.assert_close(*scores, rtol=1e-9, atol=1e-11)
    assert_same_gradients(discriminator, *(score.sin().sum() for score in scores))
    gradients = [torch.autograd.grad(score.sum(), images, create_graph=True)[0] for score in scores]
    penalties = [gradient.square().sum() for gradient in gradients]
    torch.testing.assert_close(*penalties, rtol=1e-9, atol=1e-11)
    assert_same_gradients(discriminator, *penalties)


def test_under_the_reference_backend_it_is_the_same_model() -> None:
    generator, discriminator = networks()
    z, noise = latents(), generator.noise(4)
    ours = discriminator(generator(z, noise=noise))
    with gdl_kernels.backend("reference"):
        reference = discriminator(generator(z, noise=noise))
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)


def test_a_resolution_fades_in_from_the_one_before_to_itself() -> None:
    generator, discriminator = networks()
    z, noise = latents(), generator.noise(4)
    with torch.no_grad():
        whole = generator(z, noise=noise)
        torch.testing.assert_close(generator(z, 16, 0.0, noise=noise), upsample(generator(z, 8, noise=noise[:4])))
        torch.testing.assert_close(generator(z, 16, 1 - 1e-12, noise=noise), whole, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(discriminator(whole, 0.0), discriminator(downsample(whole)))
        torch.testing.assert_close(discriminator(whole, 1 - 1e-12), discriminator(whole), rtol=1e-9, atol=1e-9)


def test_all_layers_up_to_the_newest_learn_and_none_beyond() -> None:
    generator, _ = networks()
    generator(latents(), 8).sin().sum().backward()
    for name, parameter in generator.named_parameters():
        beyond = "layers.4." in name or "layers.5." in name or "to_image.2" in name or "to_image.0" in name
        assert (parameter.grad is None) is (beyond and "mapping" not in name), name
        if parameter.grad is not None:
            assert parameter.grad.abs().sum() > 0, name


def test_noise_that_is_given_makes_the_same_images_and_noise_that_is_drawn_does_not() -> None:
    generator, _ = networks()
    z, noise = latents(), generator.noise(4, generator=torch.Generator().manual_seed(3))
    again = generator.noise(4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(generator(z, noise=noise), generator(z, noise=again))
    torch.manual_seed(1)
    first, second = generator(z), generator(z)
    assert not torch.allclose(first, second)
    torch.manual_seed(1)
    assert torch.equal(generator(z), first)


def test_new_networks_have_no_noise() -> None:
    generator = Generator(CONFIG)
    z = torch.randn(2, 12)
    assert torch.equal(generator(z), generator(z))


@pytest.mark.parametrize(("first", "end"), [(0, 2), (2, 4), (4, 6), (1, 6), (0, 6)])
def test_mixed_styles_cross_where_asked(first: int, end: int) -> None:
    a, b = torch.randn(2, 3, 6, 5)
    mixed = mix(a, b, first, end)
    for layer in range(6):
        assert torch.equal(mixed[:, layer], (b if first <= layer < end else a)[:, layer])


def test_a_call_mixes_from_a_layer_on() -> None:
    generator, _ = networks()
    a, b, noise = latents(), latents(), generator.noise(4)
    styles = torch.cat([generator.styles(a)[:, :3], generator.styles(b)[:, 3:]], 1)
    torch.testing.assert_close(generator(a, mixed=(b, 3), noise=noise), generator.synthesis(styles, 1.0, noise))


@pytest.mark.parametrize(("first", "end"), [(-1, 2), (3, 3), (4, 2), (0, 7), (7, 8)])
def test_layers_that_are_not_there_are_refused(first: int, end: int) -> None:
    with pytest.raises(ValueError, match=rf"^mixed layers must be from 0 to 6, .* got {first} to {end}$"):
        mix(torch.zeros(1, 6, 5), torch.zeros(1, 6, 5), first, end)


def test_truncation_goes_from_the_mean_style_to_none() -> None:
    generator, _ = networks()
    nn.init.normal_(generator.mean_style)
    styles = generator.eval().styles(latents())
    mean = generator.mean_style
    torch.testing.assert_close(generator.truncated(styles, 0.0), mean.expand_as(styles))
    torch.testing.assert_close(generator.truncated(styles, 1.0), styles)
    half = generator.truncated(styles, 0.5, layers=2)
    torch.testing.assert_close(half[:, :2], (mean + styles[:, :2]) / 2)
    assert torch.equal(half[:, 2:], styles[:, 2:])
    for psi in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"^psi must be finite, got {psi}"):
            generator.truncated(styles, psi)
    with pytest.raises(ValueError, match=r"^layers must not be negative, got -1"):
        generator.truncated(styles, layers=-1)


def test_the_mean_style_follows_training_and_nothing_else() -> None:
    generator, _ = networks()
    z = latents()
    generator.eval()(z)
    assert not generator.mean_style.any()
    generator.train()(z)
    first = peer_mapping(dict(generator.named_parameters()), z).mean(0)
    torch.testing.assert_close(generator.mean_style, 0.005 * first)
    generator.styles(z)
    torch.testing.assert_close(generator.mean_style, 0.995 * 0.005 * first + 0.005 * first)


def test_published_sizes() -> None:
    with torch.device("meta"):
        generator, discriminator = Generator(StyleganConfig()), Discriminator(StyleganConfig(), blur=True)
        assert generator(torch.empty(1, 512)).shape == (1, 3, 1024, 1024)
    assert sum(p.numel() for p in generator.parameters()) == 26_219_627  # table 1 of later work: 26.2 M
    assert sum(p.numel() for p in generator.mapping.parameters()) == 8 * (512 * 512 + 512)
    assert sum(p.numel() for p in discriminator.parameters()) == 23_087_249
    assert layers_at(1024) == len(generator.synthesis.layers) == 18


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", 4), ("size", 24), ("style", 0), ("mapping_layers", 0), ("mean_decay", 1.0), ("capacity", 8),
        ("mixing", 1.1), ("mixing", math.nan), ("gamma", -1.0), ("gamma", math.inf), ("classes", 10),
    ],
)  # fmt: skip
def test_a_shape_that_does_not_fit_is_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} must .*got {value!r}"):
        replace(CONFIG, **{field: value})


def test_calls_that_do_not_fit_are_refused() -> None:
    generator, _ = networks()
    with pytest.raises(ValueError, match=r"^latents must have shape \(N, 12\), got \(4, 11\)"):
        generator(latents()[:, 1:])
    with pytest.raises(ValueError, match=r"^resolution must .*at least 8 and at most 16, got 4"):
        generator(latents(), 4)
    with pytest.raises(ValueError, match=r"^alpha must be from 0 to 1, got 2"):
        generator(latents(), 8, 2)
    with pytest.raises(ValueError, match=r"^noise must have a tensor for each of 6 layers, got 4"):
        generator(latents(), 16, noise=generator.noise(4, 8))
