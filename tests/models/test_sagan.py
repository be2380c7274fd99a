"""SAGAN against a peer of torch.nn's parts, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from models.gans.data import Batch
from models.sagan.model import Discriminator, Generator, Sagan, SaganConfig

CONFIG = SaganConfig(size=32, latent=12, width=4, attention_at=16, channels=3, classes=5)


class PeerNorm(nn.Module):
    """Conditional batch norm, of torch's batch norm and embeddings."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.gain, self.bias = nn.Embedding(classes, channels), nn.Embedding(classes, channels)
        for name, buffer in nn.BatchNorm2d(channels).named_buffers():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked += 1
        x = F.batch_norm(x, self.running_mean, self.running_var, training=self.training)
        return x * (1 + self.gain(labels))[:, :, None, None] + self.bias(labels)[:, :, None, None]


class PeerAttention(nn.Module):
    """The released code's: key and value max-pooled, no division by the root of the length."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.theta, self.phi = (spectral_norm(nn.Conv2d(channels, channels // 8, 1, bias=False)) for _ in range(2))
        self.g = spectral_norm(nn.Conv2d(channels, channels // 2, 1, bias=False))
        self.o = spectral_norm(nn.Conv2d(channels // 2, channels, 1, bias=False))
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        query = self.theta(x).flatten(2)
        key, value = (F.max_pool2d(layer(x), 2).flatten(2) for layer in (self.phi, self.g))
        weights = torch.einsum("bci,bcj->bij", query, key).softmax(2)
        attended = torch.einsum("bij,bcj->bci", weights, value).unflatten(2, x.shape[2:])
        return x + self.gamma * self.o(attended)


class PeerUp(nn.Module):
    """In the order of the paper's code: the shortcut's convolution sees the enlarged image."""

    def __init__(self, inputs: int, outputs: int, classes: int) -> None:
        super().__init__()
        both = (inputs, outputs)
        self.norms = nn.ModuleList(PeerNorm(c, classes) if classes else nn.BatchNorm2d(c) for c in both)
        self.convolutions = nn.ModuleList(spectral_norm(nn.Conv2d(c, outputs, 3, padding=1)) for c in both)
        self.shortcut = spectral_norm(nn.Conv2d(inputs, outputs, 1))
        self.enlarge = nn.Upsample(scale_factor=2)

    def forward(self, x: Tensor, *labels: Tensor) -> Tensor:
        h = self.convolutions[0](self.enlarge(F.relu(self.norms[0](x, *labels))))
        return self.convolutions[1](F.relu(self.norms[1](h, *labels))) + self.shortcut(self.enlarge(x))


class PeerDown(nn.Module):
    def __init__(self, inputs: int, outputs: int, first: bool, halve: bool) -> None:
        super().__init__()
        self.first = first
        self.convolutions = nn.ModuleList(spectral_norm(nn.Conv2d(c, outputs, 3, padding=1)) for c in (inputs, outputs))
        self.shortcut = spectral_norm(nn.Conv2d(inputs, outputs, 1))
        self.reduce = nn.AvgPool2d(2) if halve else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.convolutions[0](x if self.first else F.relu(x))
        return self.reduce(self.convolutions[1](F.relu(h))) + self.reduce(self.shortcut(x))


class PeerGenerator(nn.Module):
    """For 32×32 images of width 16, with attention at 16×16."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first = spectral_norm(nn.Linear(12, 128 * 16))
        self.blocks = nn.ModuleList([PeerUp(128, 64, classes), PeerUp(64, 32, classes), PeerUp(32, 16, classes)])
        self.attention = nn.ModuleDict({"1": PeerAttention(32)})
        self.norm = nn.BatchNorm2d(16)
        self.last = spectral_norm(nn.Conv2d(16, 3, 3, padding=1))

    def forward(self, latents: Tensor, *labels: Tensor) -> Tensor:
        x = self.first(latents).view(-1, 128, 4, 4)
        x = self.blocks[1](self.blocks[0](x, *labels), *labels)
        x = self.blocks[2](self.attention["1"](x), *labels)
        return torch.tanh(self.last(F.relu(self.norm(x))))


class PeerDiscriminator(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        shapes = [(3, 16, True, True), (16, 32, False, True), (32, 64, False, True), (64, 128, False, False)]
        self.blocks = nn.ModuleList(PeerDown(*shape) for shape in shapes)
        self.attention = nn.ModuleDict({"0": PeerAttention(16)})
        self.linear = spectral_norm(nn.Linear(128, 1))
        if classes:
            self.projection = spectral_norm(nn.Embedding(classes, 128))

    def forward(self, images: Tensor, *labels: Tensor) -> Tensor:
        x = self.attention["0"](self.blocks[0](images))
        for block in list(self.blocks)[1:]:
            x = block(x)
        features = F.relu(x).sum((2, 3))
        score = self.linear(features).squeeze(1)
        return score + (self.projection(labels[0]) * features).sum(1) if labels else score


def drawn_anew(network: nn.Module) -> nn.Module:
    """All parameters random: those that start at 0 would hide what they multiply."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.5)
    return network.double().train()


def check_same(ours: nn.Module, peer: nn.Module, given: Tensor, labels: list[Tensor]) -> None:
    peer.double().train().load_state_dict(ours.state_dict())
    inputs = [given.clone().requires_grad_() for _ in range(2)]
    for _ in range(2):  # the second time with what the first has done to norms and power methods
        outputs = [network(x, *labels) for network, x in zip((ours, peer), inputs)]
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(outputs[0])
    for network, output, x in zip((ours, peer), outputs, inputs):
        grads = torch.autograd.grad((output * direction).sum(), [x, *network.parameters()])
        network.grads = dict(zip(["input", *(n for n, _ in network.named_parameters())], grads))  # type: ignore
    ours_grads: Any = ours.grads
    peer_grads: Any = peer.grads
    assert ours_grads.keys() == peer_grads.keys()
    for name, gradient in ours_grads.items():
        torch.testing.assert_close(gradient, peer_grads[name], rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value.double(), peer.state_dict()[name].double(), rtol=1e-10, atol=1e-10)
    ours.eval(), peer.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(given, *labels), peer(given, *labels), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("classes", [5, 0])
def test_the_generator_is_that_of_torch_nn(classes: int) -> None:
    config = replace(CONFIG, width=16, classes=classes)
    labels = [torch.tensor([0, 4, 2])] if classes else []
    ours = drawn_anew(Generator(config))
    check_same(ours, PeerGenerator(classes), torch.randn(3, 12, dtype=torch.float64), labels)


@pytest.mark.parametrize("classes", [5, 0])
def test_the_discriminator_is_that_of_torch_nn(classes: int) -> None:
    config = replace(CONFIG, width=16, classes=classes)
    labels = [torch.tensor([0, 4, 2])] if classes else []
    ours = drawn_anew(Discriminator(config))
    check_same(ours, PeerDiscriminator(classes), torch.randn(3, 3, 32, 32, dtype=torch.float64), labels)


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128])
def test_every_power_of_two(size: int) -> None:
    for attention_at in {0, 8 if size > 8 else 0, size // 2 if size > 8 else 0}:
        model = Sagan(SaganConfig(size=size, latent=4, width=2, attention_at=attention_at, channels=1, classes=3))
        labels = torch.tensor([2, 0])
        images = model.generate(model.generator, model.latents(2), labels)
        assert images.shape == (2, 1, size, size)
        assert images.abs().max() <= 1
        assert model.score(Batch(images, labels)).shape == (2,)
        assert bool(model.generator.attention) is bool(model.discriminator.attention) is bool(attention_at)


def test_the_paper_s_shape() -> None:
    """128×128, 64 channels, 1000 classes: 1024 channels at 4×4, and attention over 32×32."""
    width = 2  # for 64, all is 32 times as wide
    config = SaganConfig(size=128, latent=128, width=width, attention_at=32, classes=1000)
    generator, discriminator = Generator(config), Discriminator(config)
    assert generator.first.out_features == 1024 * 16 * width // 64
    widths = [block.convolutions[0].out_channels * 64 // width for block in generator.blocks]
    assert widths == [1024, 512, 256, 128, 64]
    assert list(generator.attention) == ["2"]
    widths = [block.convolutions[0].out_channels * 64 // width for block in discriminator.blocks]
    assert widths == [64, 128, 256, 512, 1024, 1024]
    assert list(discriminator.attention) == ["1"]


def test_attention_starts_as_nothing() -> None:
    for network in (Generator(CONFIG), Discriminator(CONFIG)):
        assert [p.item() for n, p in network.named_parameters() if n.endswith("gamma")] == [0.0]


def test_classes_matter_to_both() -> None:
    model = drawn_anew(Sagan(CONFIG))
    assert isinstance(model, Sagan)
    latents = torch.randn(1, 12, dtype=torch.float64).expand(5, -1)
    images = model.generator.eval()(latents, torch.arange(5))
    assert (images[0] - images[1]).abs().max() > 1e-3
    scores = model.discriminator.eval()(images[:1].expand(5, -1, -1, -1), torch.arange(5))
    assert len({round(score, 6) for score in scores.tolist()}) == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 24}, "size must be a power of two, at least 4, got 24"),
        ({"size": 4}, "size must be at least 8, got 4"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"width": 1}, "width must be at least 2 with self-attention, got 1"),
        ({"attention_at": 32}, "attention_at must be one of 0, 8, 16 at size 32, got 32"),
        ({"latent": 0}, "latent must be at least 1, got 0"),
        ({"channels": 4}, "channels must be 1 or 3, got 4"),
        ({"classes": -1}, "classes must not be negative, got -1"),
    ],
)
def test_a_shape_that_makes_no_sense_is_named(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SaganConfig(**{"size": 32, "attention_at": 16, **settings})


def test_input_that_does_not_fit_is_named() -> None:
    generator, discriminator = Generator(CONFIG), Discriminator(CONFIG)
    latents, images, labels = torch.randn(2, 12), torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"latents must have shape \(N, 12\), got \(2, 8\)"):
        generator(latents[:, :8], labels)
    with pytest.raises(ValueError, match=r"images must have shape \(N, 3, 32, 32\), got \(2, 1, 32, 32\)"):
        discriminator(images[:, :1], labels)
    with pytest.raises(ValueError, match=r"images must have shape .* got \(2, 3, 16, 16\)"):
        discriminator(images[..., :16, :16], labels)
    for network, given in ((generator, latents), (discriminator, images)):
        with pytest.raises(ValueError, match=r"labels must be integers of shape \(2,\) .* 5 classes, got None"):
            network(given)
        with pytest.raises(ValueError, match="labels must be from 0 to 4, got 0 to 5"):
            network(given, torch.tensor([0, 5]))
        with pytest.raises(ValueError, match=r"got torch.float32 of shape \(2,\)"):
            network(given, labels.float())
    free = Generator(SaganConfig(size=8, latent=12, width=2, attention_at=0))
    with pytest.raises(ValueError, match="labels must be None for a model without classes"):
        free(latents, labels)
