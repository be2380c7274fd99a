"""Phases of growth, and what happens to real images in them."""

from __future__ import annotations

import pytest
import torch

from models.gans.growing import Phase, Schedule, at_phase, check_resolution, downsample, upsample

SCHEDULE = Schedule(4, 16, fade=100, stable=60, batches={4: 20, 16: 8})


@pytest.mark.parametrize(
    ("images", "phase"),
    [
        (0, Phase(4)), (59, Phase(4)), (60, Phase(8, 0.0)), (85, Phase(8, 0.25)), (160, Phase(8)), (219, Phase(8)),
        (220, Phase(16, 0.0)), (270, Phase(16, 0.5)), (320, Phase(16)), (379, Phase(16)), (10**9, Phase(16)),
    ],
)  # fmt: skip
def test_each_resolution_fades_in_and_then_stays(images: int, phase: Phase) -> None:
    assert SCHEDULE.phase(images) == phase


def test_batches_are_those_of_the_resolution_or_of_the_next_lower() -> None:
    assert [SCHEDULE.batch(resolution) for resolution in (4, 8, 16, 32)] == [20, 20, 8, 8]


def test_steps_and_images_are_those_of_all_phases() -> None:
    assert SCHEDULE.images() == 60 + 160 + 160
    # 60 images in 3 steps of 20, 160 in 8 of 20, 160 in 20 of 8
    assert SCHEDULE.steps() == 3 + 8 + 20


def test_without_growth_there_is_one_phase() -> None:
    schedule = Schedule(8, 8, fade=5, stable=7)
    assert schedule.phase(0) == schedule.phase(1000) == Phase(8)
    assert schedule.images() == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"first": 6}, "first must be a power of two of at least 4, got 6"),
        ({"first": 2}, "first must be a power of two of at least 4, got 2"),
        ({"first": 32}, "last must be a power of two of at least 32, got 16"),
        ({"last": 24}, "last must be a power of two of at least 4, got 24"),
        ({"fade": 0}, "fade must be a whole number of at least 1, got 0"),
        ({"stable": 1.5}, "stable must be a whole number of at least 1, got 1.5"),
        ({"batches": {8: 4}}, "batches must have one for 4 or less, got {8: 4}"),
        ({"batches": {4: 0}}, "batches must be whole numbers of at least 1, got 0 at 4"),
        ({"batches": {5: 1}}, "batches must be a power of two of at least 4, got 5"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message.replace("{", r"\{") + "$"):
        Schedule(**{"first": 4, "last": 16, **arguments})


def test_a_resolution_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^side must be a power of two of at least 8 and at most 16, got 32$"):
        check_resolution("side", 32, least=8, most=16)


def test_real_images_are_as_sharp_as_generated_ones() -> None:
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(at_phase(images, Phase(16)), images)
    four = images.unflatten(3, (4, 4)).unflatten(2, (4, 4)).mean((3, 5))
    torch.testing.assert_close(at_phase(images, Phase(4)), four)
    eight = downsample(images)
    torch.testing.assert_close(at_phase(images, Phase(8, 0.0)), upsample(four))
    torch.testing.assert_close(at_phase(images, Phase(8, 0.25)), 0.75 * upsample(four) + 0.25 * eight)
