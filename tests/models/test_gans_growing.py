"""Phases of growth, and what happens to real images in them."""

from __future__ import annotations

import pytest
import torch

from models.gans.growing import GrowingConfig, GrowingRecipe, faded
from models.gans.resampling import downsample, upsample
from models.gans.schedule import Phase, Schedule, check_resolution
from models.progan.model import Progan

SCHEDULE = Schedule(4, 16, fade=100, stable=60)


@pytest.mark.parametrize(
    ("images", "phase"),
    [
        (0, Phase(4)), (59, Phase(4)), (60, Phase(8, 0.0)), (85, Phase(8, 0.25)), (160, Phase(8)), (219, Phase(8)),
        (220, Phase(16, 0.0)), (270, Phase(16, 0.5)), (320, Phase(16)), (379, Phase(16)), (10**9, Phase(16)),
    ],
)  # fmt: skip
def test_each_resolution_fades_in_and_then_stays(images: int, phase: Phase) -> None:
    assert SCHEDULE.phase(images) == phase


def test_steps_and_images_are_those_of_all_phases() -> None:
    assert SCHEDULE.images == 60 + 160 + 160
    # 60 images in 3 steps of 20, 160 in 8 of 20, 160 in 20 of 8
    assert SCHEDULE.steps({4: 20, 8: 20, 16: 8}) == 3 + 8 + 20


def test_without_growth_there_is_one_phase() -> None:
    schedule = Schedule(8, 8, fade=5, stable=7)
    assert schedule.phase(0) == schedule.phase(1000) == Phase(8)
    assert schedule.images == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"first": 6}, "first must be a power of two of at least 4, got 6"),
        ({"first": 2}, "first must be a power of two of at least 4, got 2"),
        ({"first": 32}, "last must be a power of two of at least 32, got 16"),
        ({"last": 24}, "last must be a power of two of at least 4, got 24"),
        ({"fade": 0}, "fade must be a whole number of at least 1, got 0"),
        ({"stable": 1.5}, "stable must be a whole number of at least 1, got 1.5"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Schedule(**{"first": 4, "last": 16, "fade": 5, "stable": 7, **arguments})  # type: ignore[arg-type]


def test_a_resolution_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^side must be a power of two of at least 8 and at most 16, got 32$"):
        check_resolution("side", 32, least=8, most=16)


def test_real_images_are_as_sharp_as_generated_ones() -> None:
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    four = images.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean((3, 5))
    torch.testing.assert_close(downsample(images), four)
    assert torch.equal(faded(images, 1.0), images)
    torch.testing.assert_close(faded(images, 0.0), upsample(four))
    torch.testing.assert_close(faded(images, 0.25), 0.75 * upsample(four) + 0.25 * images)


def test_batches_shrink_as_resolutions_grow_and_none_is_larger_than_asked() -> None:
    published = {4: 128, 8: 128, 16: 128, 32: 64, 64: 32, 128: 16, 256: 8, 512: 4, 1024: 4}
    assert GrowingRecipe().batches(GrowingConfig()) == published
    config = GrowingConfig(size=128, capacity=256)
    assert GrowingRecipe(batch=24).batches(config) == {4: 24, 8: 24, 16: 24, 32: 24, 64: 24, 128: 16}


@pytest.mark.parametrize(("batch", "accumulate", "group_size"), [(30, 1, 4), (16, 2, 6), (128, 3, 4), (128, 32, 4)])
def test_batches_that_can_not_be_divided_are_refused(batch: int, accumulate: int, group_size: int) -> None:
    config = GrowingConfig(size=128, capacity=128, latent=4, widest=2, group_size=group_size)
    recipe = GrowingRecipe(batch=batch // accumulate * accumulate, accumulate=accumulate)
    with pytest.raises(ValueError, match=r"^batch must be a multiple of accumulate, and its parts of group_size"):
        Progan(config).check_recipe(recipe)
