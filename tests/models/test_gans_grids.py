"""Pictures of images, and ways between latents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from models.gans.grids import between, tiled, write_grid


def test_images_lie_row_by_row() -> None:
    images = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 3, 2, 3)
    pixels = tiled(images, 3)
    assert pixels.shape == (3, 2 * 3 - 1, 3 * 4 - 1)
    assert pixels.dtype == torch.uint8
    assert pixels[0, ::3, ::4].tolist() == [[0, 64, 128], [191, 255, 0]]  # the last place has no image
    assert (pixels[:, 2] == 128).all()  # between the rows
    assert (pixels[:, :, 3::4] == 128).all()


def test_beyond_the_range_is_black_or_white() -> None:
    assert tiled(torch.tensor([-3.0, 3.0]).view(2, 1, 1, 1), 2).tolist() == [[[0, 128, 255]]]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_has_the_pixels_enlarged(tmp_path: Path, channels: int) -> None:
    images = torch.rand(4, channels, 16, 16) * 2 - 1
    write_grid(tmp_path / "a.png", images, 2)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (33 * 4, 33 * 4)
        small = picture.resize((33, 33), Image.Resampling.NEAREST)
        found = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(33, 33, channels).permute(2, 0, 1)
    assert torch.equal(found, tiled(images, 2))
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_what_is_no_image_is_named() -> None:
    for shape in ((3, 4, 4), (2, 2, 4, 4), (0, 1, 4, 4)):
        with pytest.raises(ValueError, match=r"images must be \(N, 1 or 3, H, W\), at least one, got shape"):
            tiled(torch.zeros(shape), 2)
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        tiled(torch.zeros(1, 1, 2, 2), 0)


def test_the_way_is_on_a_great_circle() -> None:
    first, last = torch.randn(3, 64), 2 * torch.randn(3, 64)
    way = between(first, last, 5).view(3, 5, 64)
    torch.testing.assert_close(way[:, 0], first)
    torch.testing.assert_close(way[:, -1], last)
    lengths = way.norm(dim=2)
    expected = torch.lerp(first.norm(dim=1)[:, None], last.norm(dim=1)[:, None], torch.linspace(0, 1, 5))
    torch.testing.assert_close(lengths, expected)
    steps = torch.nn.functional.cosine_similarity(way[:, 1:], way[:, :-1], dim=2).acos()
    torch.testing.assert_close(steps, steps[:, :1].expand(3, 4), rtol=1e-3, atol=1e-3)
    same = between(first, first, 3).view(3, 3, 64)
    torch.testing.assert_close(same, first[:, None].expand(3, 3, 64))
