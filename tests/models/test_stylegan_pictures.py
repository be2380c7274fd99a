"""Pictures of mixed styles, truncation and noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.gans.pictures import Request, truncation_sweep
from models.stylegan.model import Stylegan, StyleganConfig, mix
from models.stylegan.pictures import bands, noise, style_mixing

CONFIG = StyleganConfig(size=16, channels=1, latent=6, capacity=64, widest=6, style=5, mapping_layers=2)
REQUEST = Request(rows=2, columns=3, label=None, truncation=None, seed=5)


@pytest.fixture
def model() -> Stylegan:
    found = Stylegan(CONFIG)
    for name, parameter in found.generator.named_parameters():
        if "noise_weight" in name:  # 0 at first
            nn.init.normal_(parameter)
    nn.init.normal_(found.generator.mean_style)
    return found


def test_bands_are_the_papers_and_single_resolutions_where_there_are_few() -> None:
    assert bands(1024) == [(0, 4), (4, 8), (8, 18)]
    assert bands(64) == [(0, 4), (4, 8), (8, 10)]
    assert bands(16) == [(0, 2), (2, 4), (4, 6)]
    assert bands(8) == [(0, 2), (2, 4)]


def test_mixed_samples_have_the_styles_of_their_row_and_column(model: Stylegan) -> None:
    images, columns = style_mixing(model, REQUEST)
    assert columns == 4
    cells = images.view(-1, columns, 1, 16, 16)
    assert len(cells) == 1 + 3 * REQUEST.rows
    assert (cells[0, 0] == -1).all()
    generator = model.generator
    latents = model.latents(5, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        styles = generator.eval().styles(latents)
        shared = generator.noise(1, generator=torch.Generator().manual_seed(5))

        def image(of: Tensor) -> Tensor:
            return generator.synthesis(of, noise=shared)[0]

        for column in range(3):
            torch.testing.assert_close(cells[0, column + 1], image(styles[column : column + 1]))
        for band, (first, end) in enumerate([(0, 2), (2, 4), (4, 6)]):
            for row in range(2):
                taker = styles[3 + row : 4 + row]
                shown = cells[1 + 2 * band + row]
                torch.testing.assert_close(shown[0], image(taker))
                for column in range(3):
                    expected = image(mix(taker, styles[column : column + 1], first, end))
                    torch.testing.assert_close(shown[column + 1], expected)


def test_noise_changes_one_style_in_every_column_and_the_last_column_shows_where(model: Stylegan) -> None:
    torch.manual_seed(0)
    images, columns = noise(model, REQUEST)
    assert (len(images), columns) == (2 * 4, 4)
    for row in images.view(2, 4, 1, 16, 16):
        assert not torch.allclose(row[0], row[1])
        deviation = row[:3].std(0, correction=0)
        torch.testing.assert_close(row[3], 2 * deviation / deviation.max() - 1)
    for layer in model.generator.synthesis.layers:
        nn.init.zeros_(layer.noise_weight)
    images, _ = noise(model, REQUEST)
    for row in images.view(2, 4, 1, 16, 16):
        assert torch.equal(row[0], row[1])
        assert (row[3] == -1).all()


def test_a_truncation_sweep_comes_from_the_mean_style(model: Stylegan) -> None:
    for layer in model.generator.synthesis.layers:
        nn.init.zeros_(layer.noise_weight)
    images, columns = truncation_sweep(model, REQUEST)
    rows = images.view(-1, columns, 1, 16, 16)
    with torch.no_grad():
        mean = model.generator.mean_style.expand(1, 6, -1)
        middle = model.generator.synthesis(mean)
    distances = [(row - middle).square().mean().item() for row in rows]
    assert distances == sorted(distances)
    with torch.no_grad():
        all_mean = model.generate(model.generator, model.latents(2), None, truncation=0.0)
    torch.testing.assert_close(all_mean, middle.expand(2, -1, -1, -1))
