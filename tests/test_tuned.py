"""Tables of measured launch configurations: how they are read, and which launches they change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from setuptools.dist import Distribution

from gdl_kernels import _info, _tuned
from gdl_kernels._tuned import Tiles

ROW = {
    "op": "sparse_attention", "kernel": "forward", "head_dim": 64, "block_size": 64, "itemsize": 2, "dropout": 0,
    "own": 32, "step": 128, "num_stages": 2, "num_warps": 2,
}  # fmt: skip
TABLE = {
    "schema": 1, "gpu": "Some GPU", "versions": {}, "commit": "0123456789ab", "modified": False,
    "date": "2026-01-02T03:04:05+00:00", "rows": [ROW],
}  # fmt: skip


def written(folder: Path, content: Any) -> Path:
    path = folder / "sm_90.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_row_is_for_one_kernel_at_one_key(tmp_path: Path) -> None:
    other = {"op": "minibatch_self_attention", "kernel": "double_rows", "channels": 128, "itemsize": 4}
    table = _tuned.read(written(tmp_path, TABLE | {"rows": [ROW, {**ROW, **other}]}))
    with _tuned.using(table):
        assert _tuned.tiles(90, "sparse_attention", "forward", 64, 64, 2, 0) == Tiles(32, 128, 2, 2)
        assert _tuned.tiles(90, "minibatch_self_attention", "double_rows", 128, 4) == Tiles(32, 128, 2, 2)
        assert _tuned.tiles(90, "sparse_attention", "grad_query", 64, 64, 2, 0) is None
        for key in ((128, 64, 2, 0), (64, 128, 2, 0), (64, 64, 4, 0), (64, 64, 2, 1)):
            assert _tuned.tiles(90, "sparse_attention", "forward", *key) is None
        with _tuned.using(None):
            assert _tuned.tiles(90, "sparse_attention", "forward", 64, 64, 2, 0) is None


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the package's tables are looked for."""
    monkeypatch.setattr(_tuned, "path_of", lambda capability: tmp_path / f"sm_{capability}.json")
    _tuned.shipped.cache_clear()
    return tmp_path


def test_launchers_take_what_the_package_ships_for_their_gpu_and_else_choose(folder: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from gdl_kernels.ops.minibatch_self_attention.triton import launch as minibatch
    from gdl_kernels.ops.sparse_attention.triton import launch as sparse

    channels = {"op": "minibatch_self_attention", "channels": 64, "itemsize": 2}
    written(folder, TABLE | {"rows": [ROW, {**ROW, **channels}]})
    for capability, head_dim, kernel, tuned in (
        (90, 64, "forward", True),
        (90, 64, "grad_query", False),
        (90, 128, "forward", False),
        (80, 64, "forward", False),
    ):
        arguments = kernel, capability, head_dim, 64, 2, False
        built_in = sparse.built_in_tiles(*arguments)
        assert built_in != Tiles(32, 128, 2, 2)
        assert sparse.tiles(*arguments) == (Tiles(32, 128, 2, 2) if tuned else built_in)
        built_in = minibatch.built_in_tiles(kernel, head_dim, 2)
        assert minibatch.tiles(kernel, capability, head_dim, 2) == (Tiles(32, 128, 2, 2) if tuned else built_in)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ([], "schema must be 1, got None"),
        (TABLE | {"schema": 2}, "schema must be 1, got 2"),
        ({name: TABLE[name] for name in TABLE if name != "commit"}, "must have commit"),
        (TABLE | {"rows": [ROW, ROW]}, "row 2: is there twice"),
        (TABLE | {"rows": [3]}, "row 1: must be an object, got 3"),
        (TABLE | {"rows": [ROW | {"op": "adain"}]}, "row 1: op must be one of sparse_attention, .*, got 'adain'"),
        (TABLE | {"rows": [ROW | {"kernel": "decode"}]}, "row 1: kernel must be one of forward, .*, got 'decode'"),
        (TABLE | {"rows": [ROW | {"dropout": False}]}, "row 1: dropout must be a whole number, got False"),
        (TABLE | {"rows": [ROW | {"step": 64.0}]}, "row 1: step must be a whole number, got 64.0"),
        (TABLE | {"rows": [ROW | {"num_warps": 3}]}, "row 1: num_warps must be a power of two, got 3"),
        (TABLE | {"rows": [ROW | {"num_stages": 0}]}, "row 1: num_stages must be positive, got 0"),
        (TABLE | {"rows": [ROW | {"own": 128}]}, "row 1: own must be at most block_size, 64, got 128"),
    ],
)
def test_what_is_no_table_is_refused_by_name(folder: Path, content: Any, message: str) -> None:
    path = written(folder, content)
    with pytest.raises(ValueError, match=f"{path}: .*{message}"):
        _tuned.tiles(90, "sparse_attention", "forward", 64, 64, 2, 0)


def test_info_tells_whether_a_table_serves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        name, major, minor, total_memory = "Some GPU", 9, 0, 2**37

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Gpu)
    assert "no table" in _info.collect()["tuned"]["sm_90"]
    written(folder, TABLE)
    _tuned.shipped.cache_clear()
    assert _info.collect()["tuned"] == {"sm_90": "1 kernels, on Some GPU, 2026-01-02, commit 012345678"}
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
