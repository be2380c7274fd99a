"""Tables of measured launch configurations: how they are read, and which launches they change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from setuptools.dist import Distribution

from gdl_kernels import _info, _tuned

TILES = {"own": 32, "step": 128, "num_stages": 2, "num_warps": 2}
ROW = {
    "kernel": "forward", "key": {"head_dim": 64, "block_size": 64, "itemsize": 2, "dropout": 0}, "config": TILES,
}  # fmt: skip
ABOUT = {
    "gpu": "Some GPU", "versions": {}, "commit": "0123456789ab", "modified": False, "date": "2026-01-02T03:04:05+00:00",
}  # fmt: skip


def table(*rows: Any, op: str = "sparse_attention", **more: Any) -> dict[str, Any]:
    return {"schema": 2, "ops": {op: {**ABOUT, "rows": list(rows)}, **more}}


def changed(**parts: Any) -> dict[str, Any]:
    """The row with other values, of its config, key or itself."""
    return {
        "kernel": parts.get("kernel", ROW["kernel"]),
        "key": {name: parts.get(name, value) for name, value in ROW["key"].items()},
        "config": {name: parts.get(name, value) for name, value in TILES.items()},
    }


def written(folder: Path, content: Any) -> Path:
    path = folder / "sm_90.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def looked_up(capability: int, op: str, kernel: str, *key: int) -> _tuned.Config | None:
    built_in: _tuned.Config = {}
    found = _tuned.configuration(capability, op, kernel, key, built_in)
    return None if found is built_in else found


def test_a_row_is_for_one_kernel_at_one_key(tmp_path: Path) -> None:
    other = {"kernel": "double_rows", "key": {"channels": 128, "itemsize": 4}, "config": TILES}
    content = table(ROW, minibatch_self_attention={**ABOUT, "rows": [other]})
    with _tuned.using(_tuned.read(written(tmp_path, content))):
        assert looked_up(90, "sparse_attention", "forward", 64, 64, 2, 0) == TILES
        assert looked_up(90, "minibatch_self_attention", "double_rows", 128, 4) == TILES
        assert looked_up(90, "sparse_attention", "grad_query", 64, 64, 2, 0) is None
        for key in ((128, 64, 2, 0), (64, 128, 2, 0), (64, 64, 4, 0), (64, 64, 2, 1)):
            assert looked_up(90, "sparse_attention", "forward", *key) is None
        with _tuned.using(None):
            assert looked_up(90, "sparse_attention", "forward", 64, 64, 2, 0) is None


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the package's tables are looked for."""
    monkeypatch.setattr(_tuned, "path_of", lambda capability: tmp_path / f"sm_{capability}.json")
    _tuned.shipped.cache_clear()
    return tmp_path


def test_what_the_package_ships_is_for_its_gpu(folder: Path) -> None:
    written(folder, table(ROW))
    assert looked_up(90, "sparse_attention", "forward", 64, 64, 2, 0) == TILES
    assert looked_up(80, "sparse_attention", "forward", 64, 64, 2, 0) is None


def test_who_asks_is_told_the_launchers_own_choice() -> None:
    seen: list[Any] = []
    _tuned.observers.append(lambda key, built_in: seen.append((key, built_in)))
    try:
        with _tuned.using(_tuned.Table({}, {("some_op", "kernel", (3,)): {"own": 16}})):
            assert _tuned.configuration(90, "some_op", "kernel", (3,), {"own": 32}) == {"own": 16}
    finally:
        _tuned.observers.pop()
    assert seen == [(("some_op", "kernel", (3,)), {"own": 32})]


def test_each_op_with_triton_kernels_says_what_a_table_may_set() -> None:
    found = _tuned.tunables()
    folders = {path.parent.name for path in Path(_tuned.__file__).parent.glob("ops/*/triton*")}
    assert set(found) == folders
    for kernels in found.values():
        for tunable in kernels.values():
            assert "num_warps" in tunable.choices
            assert all(list(values) == sorted(set(values)) for values in tunable.choices.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ([], "schema must be 2, got None"),
        (table() | {"schema": 1}, "schema must be 2, got 1"),
        ({"schema": 2}, "ops must be an object, got None"),
        (table(op="adain"), "ops must be of conditional_batch_norm, .*, got 'adain'"),
        ({"schema": 2, "ops": {"sparse_attention": 3}}, "sparse_attention must have gpu, versions, .*, rows"),
        ({"schema": 2, "ops": {"sparse_attention": ABOUT}}, "sparse_attention must have rows"),
        (table(ROW, ROW), "row 2: is there twice"),
        (table(3), "row 1: must be an object, got 3"),
        (table(changed(kernel="gram")), "row 1: kernel must be one of forward, .*, got 'gram'"),
        (table({"kernel": "forward", "key": {}}), "row 1: config must be an object, got None"),
        (table({**ROW, "key": {"head_dim": 64}}), "row 1: key must have head_dim, block_size, .*, got head_dim"),
        (table(changed(dropout=False)), "row 1: dropout must be a whole number, got False"),
        (table({**ROW, "config": {**TILES, "tile": 3}}), "row 1: config has tile, must have own, step, "),
        (table({**ROW, "config": {"own": 32}}), "row 1: step must be one of 16, 32, 64, 128, got None"),
        (table(changed(step=64.0)), "row 1: step must be one of 16, 32, 64, 128, got 64.0"),
        (table(changed(num_warps=3)), "row 1: num_warps must be one of 2, 4, 8, got 3"),
        (table(changed(own=128)), "row 1: own must be at most 64, got 128"),
    ],
)
def test_what_is_no_table_is_refused_by_name(folder: Path, content: Any, message: str) -> None:
    path = written(folder, content)
    with pytest.raises(ValueError, match=f"{path}: .*{message}"):
        looked_up(90, "sparse_attention", "forward", 64, 64, 2, 0)


def test_info_tells_whether_a_table_serves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        name, major, minor, total_memory = "Some GPU", 9, 0, 2**37

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Gpu)
    assert "no table" in _info.collect()["tuned"]["sm_90"]
    later = {**ABOUT, "date": "2026-02-03T04:05:06+00:00", "rows": []}
    written(folder, table(ROW, spectral_normalize=later))
    _tuned.shipped.cache_clear()
    assert _info.collect()["tuned"]["sm_90"] == (
        "rows: sparse_attention 1, on Some GPU, 2026-01-02, commit 012345678; "
        "rows: spectral_normalize 0, on Some GPU, 2026-02-03, commit 012345678"
    )
    written(folder, "{")
    _tuned.shipped.cache_clear()
    assert "sm_90.json: not JSON" in _info.collect()["tuned"]["sm_90"]


def test_tables_are_among_the_files_that_are_installed() -> None:
    distribution = Distribution()
    distribution.parse_config_files([str(Path(__file__).parents[1] / "pyproject.toml")])
    path = _tuned.path_of(90).relative_to(Path(_tuned.__file__).parent)
    assert any(path.match(pattern) for pattern in distribution.package_data["gdl_kernels"])


def test_every_table_that_is_shipped_can_be_read() -> None:
    for path in Path(_tuned.__file__).parent.glob("tuned/*"):
        assert _tuned.read(path).rows
