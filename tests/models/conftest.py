"""What tests of models share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from models.musenet.data import Piece, chorales


@pytest.fixture(scope="session", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Each session parses for itself: what an earlier version has left in the checkout's cache proves nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # of the processes that tests start
        patch.setenv("GDL_KERNELS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def pieces(surroundings: None) -> list[Piece]:
    return chorales(4)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Every model here is tiny."""
