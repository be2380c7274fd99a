"""Where the models keep what takes long to make and is always the same."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """``GDL_KERNELS_CACHE``, or ``.cache`` in the checkout."""
    given = os.environ.get("GDL_KERNELS_CACHE")
    return Path(given) if given else Path(__file__).parents[1] / ".cache"
