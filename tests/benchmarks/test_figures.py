"""`python -m benchmarks figures`: what README and docs show is what the result files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import benchmarks.__main__ as command
from benchmarks import record
from benchmarks.figures import differences, documents, rewrite
from benchmarks.results import Result, Row
from benchmarks.tables import duration, three_digits, times
from models import compare

ROOT = Path(__file__).parents[2]

TABLE = """\
# Title

<!-- figures
from here/adain.json
columns
  ours = **{time}** ({speed-up over eager})
  of a copy = {share}
rows size
  small = 4×4
  large = 8×8
-->

<!-- /figures -->

The end.
"""


def test_every_figure_is_that_of_its_result_file() -> None:
    assert [str(difference) for difference in differences(ROOT)] == []


def test_the_documents_are_all_of_them() -> None:
    assert {ROOT / "README.md", ROOT / "docs" / "adain.md"} <= set(documents(ROOT))
    assert sum(path.read_text(encoding="utf-8").count("<!-- /figures -->") for path in documents(ROOT)) >= 10


def a_result(op: str, case: str, ours_ms: float, size: int = 4, **changed: Any) -> Result:
    rows = [
        Row("eager, slow", 0.0, 2e9, samples_ms=[9 * ours_ms] * 3, peak_bytes=3 * 2**20),
        Row("eager", 0.0, 2e9, samples_ms=[4 * ours_ms] * 3, peak_bytes=2**20),
        Row("another function", 0.0, 2e9, yardstick=True, samples_ms=[ours_ms / 2] * 3),
        Row("torch.compile", 0.0, 2e9, status="wrong", reason="its error is too large"),
        Row("gdl_kernels", 0.0, 2e9, ours=True, samples_ms=[ours_ms] * 3, peak_bytes=size * 2**20),
    ]
    for name, value in changed.items():
        setattr(rows[-1], name, value)
    copy = Row("copy", 0.0, 1e9, samples_ms=[10.0] * 3)
    return Result(op, case, f"{case} pixels", "float32", ("forward", size), 1, copy, rows)


def written(path: Path, *results: Result) -> None:
    run = record.document(results, [], torch.device("cpu"), quick=False)
    run["machine"] |= {"cpu": "A(R) CPU", "cpu_capability": "AVX2", "threads": 2}
    run["versions"]["torch"] = "2.13.0+cpu"
    run |= {"date": "2026-11-26T08:00:00+00:00", "commit": "0123456789abcdef", "modified": False}
    run["results"][0]["rows"][0]["launches"] = 3  # fields that a later version adds
    record.write(path, run)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("no figures\n")
    written(
        tmp_path / "benchmarks/results/here/adain.json",
        a_result("adain", "4×4", 25.0, 4),
        a_result("adain", "8×8", 1234.0, 8),
    )
    return tmp_path


def made(root: Path, text: str) -> str:
    """The document, made."""
    path = root / "docs" / "a.md"
    path.write_text(text, encoding="utf-8")
    rewrite(root)
    return path.read_text(encoding="utf-8")


def cells(root: Path, text: str) -> list[list[str]]:
    lines = [line for line in made(root, text).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


def test_a_table_is_made_and_all_else_is_kept(root: Path) -> None:
    text = made(root, TABLE)
    assert "\n\n".join(text.split("-->\n\n")[1].split("\n\n")[:2]) == (
        "| size | ours | of a copy |\n"
        "| --- | ---: | ---: |\n"
        "| small | **25.0 ms** (4.00×) | 80% |\n"
        "| large | **1.23 s** (4.00×) | 2% |\n"
        "\n"
        "On here (A CPU, AVX2, 2 threads, PyTorch 2.13.0): [adain](../benchmarks/results/here/adain.json) at 0123456, "
        "2026-11-26."
    )
    before, after = TABLE.split("-->\n\n<!-- /figures -->\n")
    assert text.startswith(before)
    assert text.endswith(f"\n\n<!-- /figures -->\n{after}")
    assert differences(root) == []
    assert rewrite(root) == []
    assert made(root, text) == text


def test_a_figure_that_was_altered_is_found(root: Path) -> None:
    path = root / "docs" / "a.md"
    path.write_text(made(root, TABLE).replace("25.0 ms", "24.0 ms"), encoding="utf-8")
    (difference,) = differences(root)
    assert str(difference) == (
        "docs/a.md:15: has '| small | **24.0 ms** (4.00×) | 80% |', "
        "but its result files say '| small | **25.0 ms** (4.00×) | 80% |'"
    )
    assert "24.0 ms" in path.read_text(encoding="utf-8")
    assert rewrite(root) == [path]
    assert "25.0 ms" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("change", [lambda body: body[:-1], lambda body: [*body, ""], lambda body: ["", *body]])
def test_lines_too_few_or_too_many_are_found(root: Path, change: Any) -> None:
    head, rest = made(root, TABLE).split("-->\n")[:2]
    *body, _ = rest.split("\n")
    text = head + "-->\n" + "\n".join([*change(body), "<!-- /figures -->\n"])
    (root / "docs" / "a.md").write_text(text, encoding="utf-8")
    assert len(differences(root)) == 1


def test_a_run_that_changed_is_found(root: Path) -> None:
    made(root, TABLE)
    written(root / "benchmarks/results/here/adain.json", a_result("adain", "4×4", 20.0), a_result("adain", "8×8", 1.0))
    (difference,) = differences(root)
    assert difference.must_have == "| small | **20.0 ms** (4.00×) | 100% |"


def test_what_a_fence_shows_is_no_block(root: Path) -> None:
    fenced = f"```\n{TABLE}```\n"
    assert made(root, fenced) == fenced


def test_columns_rows_and_files_combine(root: Path) -> None:
    written(
        root / "benchmarks/results/there/pixel_norm.json",
        a_result("pixel_norm", "forward, 4×4", 2.0, 4),
        a_result("pixel_norm", "forward, 1024", 8.0, 1024),
    )
    written(root / "benchmarks/results/there/again.json", a_result("adain", "4×4", 5.0, 4))
    text = """\
<!-- figures
from here/adain.json
from there/again.json
from there/pixel_norm.json
columns pixel_norm: forward, *
  norm = {time}
  rival = {name of the fastest rival}, {speed-up over the fastest rival}, {time of another*}
  n = {exponent of time} {exponent of memory} {rate} {memory} {time of ceiling}
columns adain: 4×4
  adain, again = {time}
  compiled = {time of torch.compile} {speed-up over eager*} {shape}
rows
  every * = *
-->
<!-- /figures -->
"""
    again = ["5.00 ms", "wrong 9.00× 4×4 pixels"]
    assert cells(root, text)[2:] == [
        ["every 4×4", "2.00 ms", "eager, 4.00×, 1.00 ms", "0.25 1.00 1,000 GB/s 4 MiB 10.0 ms", *again],
        ["every 1,024", "8.00 ms", "eager, 4.00×, 4.00 ms", "0.25 1.00 250 GB/s 1,024 MiB 10.0 ms", *again],
    ]
    caption = (root / "docs" / "a.md").read_text(encoding="utf-8")
    assert caption.count("On here (") == caption.count("On there (") == 1


def test_a_comparison_is_a_source(root: Path) -> None:
    written_comparison(root / "benchmarks/results/here/compare_sagan.json", agree=True)
    text = """\
<!-- figures
from here/compare_sagan.json
columns compare_sagan: *
  ours = {time}
  PyTorch = {time of PyTorch}
  faster = {speed-up over PyTorch}
  memory, ours = {memory}
  PyTorch = {memory of PyTorch}
rows
  forward
  step = training step
-->
<!-- /figures -->
"""
    table = cells(root, text)
    assert table[0] == ["", "ours", "PyTorch", "faster", "memory, ours", "PyTorch"]
    assert table[2] == ["forward", "500 ms", "1.50 s", "3.00×", "1 MiB", "2 MiB"]
    assert table[3] == ["step", "2.00 s", "3.00 s", "1.50×", "1 MiB", "2 MiB"]
    caption = " ".join((root / "docs" / "a.md").read_text(encoding="utf-8").split())
    assert "thread" in caption
    assert (
        "PyTorch 2.13.0): [compare_sagan](../benchmarks/results/here/compare_sagan.json) "
        "at 0123456 with changes, 2026-11-26." in caption
    )


def written_comparison(path: Path, *, agree: bool, **about: Any) -> None:
    sides = {"forward": (0.5, 1.5), "training step": (2.0, 3.0)}
    comparison = compare.Comparison(
        torch.float32, "cpu", 10, 3, {"adain": {"cpu": "chosen"}}, 0.0 if agree else 1.0, {}, 0.0, "weight",
        {
            phase: {
                "kernels": compare.Measurement(ours, 0.0, 2**20),
                "reference": compare.Measurement(theirs, 0.0, 2**21),
            }
            for phase, (ours, theirs) in sides.items()
        },
    )  # fmt: skip
    found = comparison.as_json()
    found["machine"]["torch"] = "2.13.0+cpu"
    about = {"date": "2026-11-26T08:00:00+00:00", "commit": "0123456789abcdef", "modified": True, **about}
    path.write_text(json.dumps({"model": "sagan", **about, **found}), encoding="utf-8")


def test_what_calls_cost_is_a_source(root: Path) -> None:
    def call(name: str, group: str, seconds: float, kernel: float | None) -> dict[str, Any]:
        return {
            "group": group,
            "params": {"name": name},
            "extra_info": {"seconds": seconds, "kernel": kernel},
        }

    found = {
        "machine_info": {"cpu": {"brand_raw": "Some(R) CPU"}, "threads": 1, "torch": "2.13.0+cpu"},
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-11-26T08:00:00+00:00",
        "benchmarks": [
            call("F.group_norm", "forward", 4e-6, None),
            call("adain", "forward", 9e-6, 1.5e-6),
            call("adain", "forward with a gradient", 3.05e-5, 1.5e-6),
        ],
    }
    (root / "benchmarks/results/here/dispatch.json").write_text(json.dumps(found), encoding="utf-8")
    text = """\
<!-- figures
from here/dispatch.json
columns *; forward
  forward = {time}
  besides the kernel = {time of the rest}
rows
  *
-->
<!-- /figures -->
"""
    assert cells(root, text)[2:] == [["F.group_norm", "4.00 µs", "–"], ["adain", "9.00 µs", "7.50 µs"]]
    caption = " ".join((root / "docs" / "a.md").read_text(encoding="utf-8").split())
    assert "On here (Some CPU, 1 thread, PyTorch 2.13.0):" in caption
    assert "at 0123456, 2026-11-26." in caption


COMPARISON = "<!-- figures\nfrom here/c.json\ncolumns\n  x = {time}\nrows\n  forward\n-->\n<!-- /figures -->\n"


def test_a_comparison_that_disagrees_has_no_figures(root: Path) -> None:
    written_comparison(root / "benchmarks/results/here/c.json", agree=False)
    with pytest.raises(ValueError, match=r"docs/a\.md:6: c: forward: ours has no time, it is wrong: it disagrees"):
        made(root, COMPARISON)


def test_a_comparison_without_its_commit_is_refused(root: Path) -> None:
    path = root / "benchmarks/results/here/c.json"
    written_comparison(path, agree=True)
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "commit"}))
    with pytest.raises(ValueError, match=r"docs/a\.md:2: .*c\.json: has no commit: .* must write it anew"):
        made(root, COMPARISON)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("here/adain.json", "here/none.json", r"4: .*none\.json: can't be read \(No such file"),
        ("4×4", "4×5", r"9: no file has the case '4×5'; closest: '4×4', "),
        ("4×4", "*×5", r"9: no file has a case like '\*×5'"),
        ("{share}", "{share of FlexAttention}", r"7: no row has a value for .*; the contestants are 'eager, slow', "),
        ("{share}", "{shares}", r"7: a quantity must be one of time, .*, got 'shares'"),
        ("{share}", "{speed-up}", r"7: a quantity must be .*, got 'speed-up'"),
        ("{share}", "{time over eager}", r"7: a quantity must be .*, got 'time over eager'"),
        ("{share}", "share", r"7: must have a quantity in braces, got 'share'"),
        ("  of a copy = {share}", "  {share}", r"7: a column must be `heading = cell`, got '\{share\}'"),
        ("rows size", "row size", r"8: must be `from FILE`, `columns`, `rows`, or indented .*, got 'row size'"),
        ("columns\n", "", r"5: must come after `columns` or `rows`"),
        ("from here/adain.json\n", "", r"3: has no `from FILE`"),
        ("rows size\n  small = 4×4\n  large = 8×8\n", "", r"3: has no `rows`"),
        ("  ours = **{time}** ({speed-up over eager})\n  of a copy = {share}\n", "", r"3: has no `columns`"),
        ("<!-- /figures -->", "", r"11: '-->' must be followed by '<!-- /figures -->'"),
        ("-->\n\n", "", r"3: '<!-- figures' must be followed by '-->'"),
        ("<!-- figures", "<!-- figure", r"3: a marker must be '<!-- figures', or .*, got '<!-- figure'"),
    ],
)
def test_a_mistake_is_told_with_its_line(root: Path, old: str, new: str, message: str) -> None:
    path = root / "docs" / "a.md"
    path.write_text(TABLE.replace(old, new, 1), encoding="utf-8")
    for do in (differences, rewrite):
        with pytest.raises(ValueError, match=rf"^docs/a\.md:{message}"):
            do(root)
    assert path.read_text(encoding="utf-8") == TABLE.replace(old, new, 1)


def test_what_is_missing_beside_a_figure_is_a_dash(root: Path) -> None:
    assert "| **25.0 ms** (–) |" in made(root, TABLE.replace("over eager", "over FlexAttention"))


def test_a_mistake_anywhere_leaves_all_documents_as_they_were(root: Path) -> None:
    (root / "docs" / "a.md").write_text(TABLE, encoding="utf-8")
    (root / "docs" / "b.md").write_text(TABLE.replace("8×8", "9×9"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"docs/b\.md:10: no file has the case '9×9'"):
        rewrite(root)
    assert (root / "docs" / "a.md").read_text(encoding="utf-8") == TABLE


def test_a_case_of_two_ops_must_be_named_in_full(root: Path) -> None:
    written(root / "benchmarks/results/here/other.json", a_result("pixel_norm", "4×4", 2.0))
    text = TABLE.replace("from here/adain.json", "from here/adain.json\nfrom here/other.json")
    with pytest.raises(ValueError, match=r"docs/a\.md:10: the case '4×4' is of adain and of pixel_norm: write `op: "):
        made(root, text)
    assert "| small | **25.0 ms**" in made(root, text.replace("= 4×4", "= adain: 4×4"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"samples_ms": [], "status": "wrong", "reason": "too large"}, "ours has no time, it is wrong: too large"),
        ({"ours": False}, "has no row of ours"),
    ],
)
def test_a_row_without_our_time_is_refused(root: Path, changed: dict[str, Any], message: str) -> None:
    path = root / "benchmarks/results/here/adain.json"
    written(path, a_result("adain", "4×4", 25.0, **changed), a_result("adain", "8×8", 1.0))
    with pytest.raises(ValueError, match=rf"docs/a\.md:9: adain: 4×4:? {message}"):
        made(root, TABLE)


def test_the_command(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "ROOT", root)
    path = root / "docs" / "a.md"
    path.write_text(TABLE, encoding="utf-8")
    call = CliRunner().invoke
    checked = call(command.app, ["figures", "--check"])
    assert checked.exit_code == 1
    assert "docs/a.md:13: has ''" not in checked.output  # the first line differs in neither
    assert "docs/a.md:13: has '<!-- /figures -->', but its result files say '| size |" in checked.output
    assert path.read_text(encoding="utf-8") == TABLE
    wrote = call(command.app, ["figures"])
    assert (wrote.exit_code, wrote.output) == (0, "written: docs/a.md\n")
    assert call(command.app, ["figures", "--check"]).exit_code == 0
    path.write_text(TABLE.replace("8×8", "9×9"), encoding="utf-8")
    mistaken = call(command.app, ["figures"])
    assert mistaken.exit_code == 1
    assert "docs/a.md:10: no file has the case '9×9'" in mistaken.output


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"),
        (0.2524, "0.252"),
        (0.7, "0.700"),
        (9.999, "10.0"),
        (47.58, "47.6"),
        (999.4, "999"),
        (1039, "1,039"),
    ],
)
def test_three_digits(value: float, text: str) -> None:
    assert three_digits(value) == text


def test_units() -> None:
    assert [duration(ms) for ms in (0.00823, 0.09992, 0.09996, 0.2524, 999.4, 999.6, 23562.0)] == [
        "8.23 µs", "99.9 µs", "0.100 ms", "0.252 ms", "999 ms", "1.00 s", "23.6 s",
    ]  # fmt: skip
    assert [times(ratio) for ratio in (0.842, 1.3, 9.73, 20.2, 361.9)] == ["0.84×", "1.30×", "9.73×", "20.2×", "362×"]
