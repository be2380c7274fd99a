"""Launch configurations that were measured on a GPU: the tables that ``python -m benchmarks tune`` writes.

``gdl_kernels/tuned/sm_90.json`` is for every GPU of compute capability 9.0, and read when the first kernel that it may
serve is launched. A row is for one kernel at one key, and no other: where there is no table, or no row for a call, the
launcher's own choice stays. What may be in a row each op says itself, in its ``tunable.py``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import ops

#: Raised when a reader of older tables would misread a newer one.
SCHEMA = 2

#: What a table says of the origin of each op's rows.
ABOUT = ("gpu", "versions", "commit", "modified", "date")

#: How a kernel is launched: tile sizes, warps and whatever else may be chosen, by name.
Config = Mapping[str, int]

#: Op, kernel, and the values of the kernel's ``Tunable.keys``.
Key = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True)
class Tunable:
    """What a table may set of a kernel, or of several that share what is set.

    Attributes:
        keys: what a row is looked up by; all whole numbers, of what holds or doesn't 1 or 0.
        choices: what a row sets, and the values that each may have, rising.
        refuses: why a key can't have a configuration made of choices, where registers would spill, say; else empty.
    """

    keys: tuple[str, ...]
    choices: Mapping[str, Sequence[int]]
    refuses: Callable[[Mapping[str, int], Config], str] = lambda key, config: ""

    def fault(self, key: Mapping[str, int], config: Mapping[str, Any]) -> str:
        """Why a configuration is none for a key; empty if it is one."""
        for name in config:
            if name not in self.choices:
                return f"config has {name}, must have {', '.join(self.choices)}"
        for name, values in self.choices.items():
            value = config.get(name)
            if type(value) is not int or value not in values:
                return f"{name} must be one of {', '.join(map(str, values))}, got {value!r}"
        return self.refuses(key, config)


def at_most(name: str, most: int, config: Config) -> str:
    """For ``Tunable.refuses``: a number that has a bound."""
    return f"{name} must be at most {most}, got {config[name]}" if config[name] > most else ""


@dataclass(frozen=True)
class Table:
    """What a file holds: for each op where its rows come from, and the configuration for each key."""

    about: Mapping[str, Mapping[str, Any]]
    rows: Mapping[Key, Config]


#: Called with each key that is looked up and the launcher's own choice for it: so tuning learns what a pass launches.
observers: list[Callable[[Key, Config], object]] = []

#: Open regions of :func:`using`, the innermost last.
_regions: list[Table | None] = []


def configuration(capability: int, op: str, kernel: str, key: tuple[int, ...], built_in: Config) -> Config:
    """What a table has for a kernel, or else the launcher's own choice.

    Args:
        capability: as in ``sm_90``.
        key: the values of the kernel's ``Tunable.keys``.
        built_in: the launcher's own choice.

    Raises:
        ValueError: naming the file, if the table is malformed.
    """
    for observe in observers:
        observe((op, kernel, key), built_in)
    table = _regions[-1] if _regions else shipped(capability)
    return built_in if table is None else table.rows.get((op, kernel, key), built_in)


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


@functools.cache
def tunables() -> Mapping[str, Mapping[str, Tunable]]:
    """By op and kernel, what a table may set: the ``KERNELS`` of each op's ``tunable.py``."""
    found = {}
    for module in pkgutil.iter_modules(ops.__path__):
        name = f"{ops.__name__}.{module.name}.tunable"
        if importlib.util.find_spec(name) is not None:
            found[module.name] = importlib.import_module(name).KERNELS
    return found


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
    by_op = content.get("ops")
    if not isinstance(by_op, dict):
        raise ValueError(f"{path}: ops must be an object, got {by_op!r}")
    about: dict[str, Mapping[str, Any]] = {}
    rows: dict[Key, Config] = {}
    for op, part in by_op.items():
        if op not in tunables():
            raise ValueError(f"{path}: ops must be of {', '.join(tunables())}, got {op!r}")
        lacking = [name for name in (*ABOUT, "rows") if not isinstance(part, dict) or name not in part]
        if lacking:
            raise ValueError(f"{path}: {op} must have {', '.join(lacking)}")
        for number, row in enumerate(part["rows"], start=1):
            try:
                kernel, key, config = _parsed(op, row)
                if (op, kernel, key) in rows:
                    raise ValueError("is there twice")
            except ValueError as error:
                raise ValueError(f"{path}: {op}, row {number}: {error}") from error
            rows[op, kernel, key] = config
        about[op] = {name: part[name] for name in ABOUT}
    return Table(about, rows)


def _parsed(op: str, row: Any) -> tuple[str, tuple[int, ...], Config]:
    if not isinstance(row, dict):
        raise ValueError(f"must be an object, got {row!r}")
    kernels = tunables()[op]
    kernel: Any = row.get("kernel")
    key: Any = row.get("key")
    config: Any = row.get("config")
    if kernel not in kernels:
        raise ValueError(f"kernel must be one of {', '.join(kernels)}, got {kernel!r}")
    for name, value in (("key", key), ("config", config)):
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be an object, got {value!r}")
    tunable = kernels[kernel]
    if set(key) != set(tunable.keys):
        raise ValueError(f"key must have {', '.join(tunable.keys)}, got {', '.join(key)}")
    for name, value in key.items():
        if type(value) is not int:  # nor a bool, which would be a key of its own in JSON
            raise ValueError(f"{name} must be a whole number, got {value!r}")
    if why := tunable.fault(key, config):
        raise ValueError(why)
    return kernel, tuple(key[name] for name in tunable.keys), config
