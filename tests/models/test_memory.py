"""Memory that is kept."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

PROBE = """
import re, sys
from pathlib import Path
import torch
from models.memory import keep_freed_memory

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

if "keep" in sys.argv:
    keep_freed_memory()
before = resident()
large = torch.ones(256 << 20, dtype=torch.uint8)
del large
print(resident() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt")
@pytest.mark.parametrize(("arguments", "kept"), [((), False), (("keep",), True)])
def test_a_freed_block_is_kept_if_it_was_asked_for(arguments: tuple[str, ...], kept: bool) -> None:
    grown = int(subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, check=True).stdout)
    assert (grown > 200 << 20) == kept
