"""Launches that go nowhere: what Triton asks of a GPU, answered where there is none."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Driver:
    """Of some GPUs of compute capability 9.0.

    Attributes:
        launch: called in place of a kernel, with the grid, the stream, the kernel's number from 1 on in the order in
            which they were loaded, its metadata, those of the launch, two hooks, and the kernel's arguments.
        device: the one that is current.
    """

    def __init__(self, launch: Callable[..., None]) -> None:
        self.launch, self.device = launch, 0
        numbers = itertools.count(1)
        self.utils = SimpleNamespace(
            load_binary=lambda *_: ("module", next(numbers), 32, 0, 1024),  # then registers, spills, threads
            get_device_properties=lambda _: {"max_shared_mem": 227 * 1024},
        )

    def launcher_cls(self, _source: Any, _metadata: Any) -> Callable[..., None]:
        return self.launch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, _device: int) -> int:
        return 0


@contextmanager
def launching(launch: Callable[..., None]) -> Iterator[Driver]:
    """In a region, kernels are compiled as for a GPU, and launched so."""
    made = Driver(launch)
    driver.set_active(made)
    try:
        yield made
    finally:
        if torch.cuda.is_available():  # without a GPU there is no driver to go back to
            driver.reset_active()
