"""What every test can ask for."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import pytest
import torch

# Tests read what the command line says, not where 80 columns break it; typer reads this when it is imported.
os.environ["TERMINAL_WIDTH"] = "200"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _drawn_numbers(request: pytest.FixtureRequest) -> None:
    """Every run draws its numbers anew. Continuous integration draws the same ones, as hypothesis does there."""
    if "CI" in os.environ:
        torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _shared_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a test on a GPU: is it still usable? And of several processes none keeps memory that it has no use for."""
    yield
    if not request.node.get_closest_marker("gpu"):
        return
    several = "PYTEST_XDIST_WORKER" in os.environ
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:  # an illegal access, after which every call of this process fails
        if several:
            os._exit(1)  # pytest-xdist goes on in a new process
        pytest.exit(f"nothing runs on the GPU after {request.node.nodeid}: {error}", returncode=1)
    if several:
        torch.cuda.empty_cache()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """What is this small only waits for other threads, by far so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def nan_poison() -> Iterator[None]:
    """Memory that torch.empty and its like return is full of NaN, so what a kernel forgets to write shows."""
    was_on = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan(), "this torch does not fill uninitialised memory"
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=warned_only)
