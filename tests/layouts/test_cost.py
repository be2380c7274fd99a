"""Building long layouts: under two seconds of one thread and 500 MB."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# In a process of its own, whose peak memory is the layout's. The CPU time of one thread is what a clock shows on an
# idle machine, and hardly changes on a busy one.
MEASURE = """
import json, resource, time
import torch
torch.set_num_threads(1)
from gdl_kernels import layouts

layouts.causal(256) | layouts.strided(256, 4)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
seconds = []
for _ in range(3):
    start = time.process_time()
    layout = {build}
    seconds.append(time.process_time() - start)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([min(seconds), (after - before) / 1024, layout.kept_blocks]))
"""


def measure(script: str) -> list[float]:
    run = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout)


@pytest.mark.parametrize(
    ("build", "blocks"),
    [
        ("layouts.local(1_048_576, 1024)", 16384 * 17 - sum(range(1, 17))),
        # A run is two blocks; a row keeps the second one of each run before its own, and its run up to the diagonal.
        ("layouts.fixed(262_144, 128, 32)", sum(row // 2 + row % 2 + 1 for row in range(4096))),
        # A run of places is eight blocks, each kept up to its diagonal; a row of the window reaches back two blocks.
        ("layouts.strided(65_536, 128) | layouts.local(65_536, 128)", 128 * (8 * 9 // 2) + 1024 * 3 - 3),
    ],
)
def test_long_layouts(build: str, blocks: int) -> None:
    seconds, megabytes, kept = measure(MEASURE.format(build=build))
    assert kept == blocks
    assert megabytes < 500, f"peak memory grew by {megabytes:.0f} MB"
    assert seconds < 2, f"the best of three took {seconds:.2f} s"


def test_from_mask_copies_no_mask() -> None:
    """A gigabyte of mask costs less than a third of its size again, when its masks repeat."""
    script = MEASURE.replace("before =", "mask = torch.ones(32768, 32768, dtype=torch.bool).tril_()\nbefore =")
    _, megabytes, kept = measure(script.format(build="layouts.from_mask(mask)").replace("range(3)", "range(1)"))
    assert kept == 512 * 513 // 2
    assert megabytes < 340
