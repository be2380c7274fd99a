"""Launch configurations that were measured on a GPU: the tables that ``python -m benchmarks tune`` writes.

``gdl_kernels/tuned/sm_90.json`` is for every GPU of compute capability 9.0, and read when the first kernel that it may
serve is launched. A row is for one kernel at one key, and no other: where there is no table, or no row for a call, the
launcher's own choice stays.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

#: Raised when a reader of older tables would misread a newer one.
SCHEMA = 1

#: What a row of each op is looked up by, besides the kernel; all whole numbers, ``dropout`` 0 or 1.
KEYS = {
    "sparse_attention": ("head_dim", "block_size", "itemsize", "dropout"),
    "minibatch_self_attention": ("channels", "itemsize"),
}

#: The kernels of each of these ops.
KERNELS = ("forward", "grad_query", "grad_key_value", "double_rows", "double_columns")

#: What a table says of its origin.
ABOUT = ("gpu", "versions", "commit", "modified", "date")


class Tiles(NamedTuple):
    """How one kernel of an attention is launched.

    Attributes:
        own: positions that a program owns: queries, or keys in the kernels of their gradients.
        step: positions that it takes at a time from those it walks.
        num_stages: depth of the pipeline.
        num_warps: warps a program.
    """

    own: int
    step: int
    num_stages: int
    num_warps: int


#: Op, kernel, and the values of the op's ``KEYS``.
Key = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True)
class Table:
    """What a file holds: where its figures come from, and the configuration for each key."""

    about: Mapping[str, Any]
    rows: Mapping[Key, Tiles]


#: Open regions of :func:`using`, the innermost last.
_regions: list[Table | None] = []


def tiles(capability: int, op: str, kernel: str, *key: int) -> Tiles | None:
    """What a table has for a kernel; None where the launcher has to choose.

    Args:
        capability: as in ``sm_90``.
        key: the values of ``KEYS[op]``.

    Raises:
        ValueError: naming the file, if the table is malformed.
    """
    table = _regions[-1] if _regions else shipped(capability)
    return None if table is None else table.rows.get((op, kernel, key))


@contextmanager
def using(table: Table | None) -> Iterator[None]:
    """In a region, use this table instead of the package's; None leaves every launcher to its own choice.

    The region is the process's, not the thread's, as the backward pass runs in threads of its own.
    """
    _regions.append(table)
    try:
        yield
    finally:
        _regions.pop()


def path_of(capability: int) -> Path:
    return Path(__file__).parent / "tuned" / f"sm_{capability}.json"


@functools.cache
def shipped(capability: int) -> Table | None:
    """The package's table for a compute capability, if there is one."""
    path = path_of(capability)
    return read(path) if path.exists() else None


def read(path: Path) -> Table:
    """A table.

    Raises:
        ValueError: naming the file, and the row where it is one, if it can't be read or isn't a table.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: can't be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path}: not a table of `python -m benchmarks tune`: schema must be {SCHEMA}, got {schema!r}")
    lacking = [name for name in (*ABOUT, "rows") if name not in content]
    if lacking:
        raise ValueError(f"{path}: must have {', '.join(lacking)}")
    rows: dict[Key, Tiles] = {}
    for number, row in enumerate(content["rows"], start=1):
        try:
            key, config = _parsed(row)
            if key in rows:
                raise ValueError("is there twice")
        except ValueError as error:
            raise ValueError(f"{path}: row {number}: {error}") from error
        rows[key] = config
    return Table({name: content[name] for name in ABOUT}, rows)


def _parsed(row: Any) -> tuple[Key, Tiles]:
    if not isinstance(row, dict):
        raise ValueError(f"must be an object, got {row!r}")
    op, kernel = row.get("op"), row.get("kernel")
    if op not in KEYS:
        raise ValueError(f"op must be one of {', '.join(KEYS)}, got {op!r}")
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    for name in (*KEYS[op], *Tiles._fields):
        if type(row.get(name)) is not int:  # nor a bool, which would be a key of its own in JSON
            raise ValueError(f"{name} must be a whole number, got {row.get(name)!r}")
    config = Tiles(*(row[name] for name in Tiles._fields))
    for name in ("own", "step", "num_warps"):
        value = row[name]
        if value < 1 or value & (value - 1):
            raise ValueError(f"{name} must be a power of two, got {value}")
    if config.num_stages < 1:
        raise ValueError(f"num_stages must be positive, got {config.num_stages}")
    if config.own > row.get("block_size", config.own):
        raise ValueError(f"own must be at most block_size, {row['block_size']}, got {config.own}")
    return (op, kernel, tuple(row[name] for name in KEYS[op])), config
