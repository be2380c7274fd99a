"""The HTML page of runs: whole, needing nothing from outside, and readable in a real browser."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from benchmarks import record
from benchmarks.__main__ import app
from benchmarks.page import plots, write
from benchmarks.results import Bar, Result, Row

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def a_result(size: int, *, status: Any = "timed") -> Result:
    top = Row("torch.mm 2048³, float32", flops=1e9, bytes=0, samples_ms=[1.0, 1.1, 1.2])
    rows = [
        Row("eager", 1e8, 1e6, samples_ms=[8.0 * size] * 3, peak_bytes=2**22 * size),
        Row("torch.compile", 1e8, 1e6, samples_ms=[4.0 * size] * 3, peak_bytes=2**21 * size),
        Row("SDPA, dense", 9e8, 1e6, yardstick=True, samples_ms=[0.5] * 3),
        Row("gdl_kernels", 1e8, 1e6, ours=True, status=status, reason="it is off",
            samples_ms=[0.5 * size] * 3 if status == "timed" else [], peak_bytes=2**20 * size),
    ]  # fmt: skip
    growth = ("forward over batch", size)
    return Result("sparse_attention", f"n {size} <b>&", f"1×{size}", "float32", growth, 1, top, rows)


def a_run(**changes: Any) -> dict[str, Any]:
    bars = [Bar("ours is fast", 3.0, 8.0), Bar("ours is small", 2.0, 4.0, at_most=True), Bar("on a GPU", 5.0, None)]
    results = [a_result(1), a_result(2), a_result(4)]
    return json.loads(json.dumps({**record.document(results, bars, torch.device("cpu"), quick=False), **changes}))


class Outline(html.parser.HTMLParser):
    """What a page loads, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


DATE = "2026-11-26T00:00:00+00:00"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    write(path, [("attention", a_run(date=DATE))], [ROOT / "docs" / "layouts.png"])
    return path


def test_it_needs_no_other_file_and_has_no_script(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    outline = Outline(text)
    assert "script" not in outline.tags
    assert "link" not in outline.tags
    assert all(source.startswith(("#", "data:image/png;base64,")) for source in outline.sources)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)


def test_what_it_says(page: Path) -> None:
    text = " ".join(Outline(page.read_text(encoding="utf-8")).text.split())
    assert "ours is fast ≥ 3.00× 8.00× met" in text
    assert "ours is small ≤ 2.00× 4.00× missed" in text
    assert "on a GPU ≥ 5.00× – not measured" in text
    assert "torch.compile 8.00× eager 16.0×" in text  # the fastest rival first
    assert "n 1 <b>&" in text
    assert "n^1.00" in text  # the fitted growth
    assert "sparse_attention: forward over batch, float32" in text
    assert re.search(r"\bbatch\b(?!,)", text), "what the curve is over, below it"
    assert "matrix product, float32" in text
    assert "SDPA, dense" not in text.split("Growth")[1].split("Roofline")[0] or "SDPA, dense 1.00×" not in text
    for title in ("local", "strided", "fixed", "sliding with sinks"):
        assert title in text


def test_what_is_wrong_has_no_time(tmp_path: Path) -> None:
    run = a_run(results=[json.loads(json.dumps(record.document([a_result(1, status="wrong")], [], torch.device("cpu"),
                                                               quick=True)["results"][0]))])  # fmt: skip
    write(tmp_path / "page.html", [("wrong", run)])
    text = " ".join(Outline((tmp_path / "page.html").read_text(encoding="utf-8")).text.split())
    assert "1 of the rows were wrong, and have no time." in text
    assert "wrong: it is off" in text
    assert "Roofline" not in text
    assert "Growth" not in text


def test_what_failed_is_told(tmp_path: Path) -> None:
    results = [a_result(1, status="failed"), Result.failed("adain", "forward", "MemoryError: all gone"), a_result(2)]
    run = json.loads(json.dumps(record.document(results, [], torch.device("cpu"), quick=True)))
    del run["results"][-1]["failure"]  # as in runs of before there was such a thing
    write(tmp_path / "page.html", [("failed", run)])
    text = " ".join(Outline((tmp_path / "page.html").read_text(encoding="utf-8")).text.split())
    assert "2 of the rows or cases failed, and have no time." in text
    assert "failed: it is off" in text
    assert "adain forward failed: MemoryError: all gone" in text


def test_a_model_is_told_like_an_op(tmp_path: Path) -> None:
    """By its name; in seconds it has no exponent, and without a size no curve."""
    rows = [
        Row("eager", 4e12, 0.0, samples_ms=[24_691.0] * 3, peak_bytes=2**31),
        Row("gdl_kernels", 4e12, 0.0, ours=True, samples_ms=[12_345.5] * 3, peak_bytes=2**30),
    ]
    top = Row("torch.mm 2048³, float32", 17e9, 0.0, samples_ms=[34.0] * 3)
    model = Result("sagan", "training step, 16×64×64, fp32", "8.5 M parameters", "float32", None, 1, top, rows)
    run = json.loads(json.dumps(record.document([model], [], torch.device("cpu"), quick=False)))
    write(tmp_path / "page.html", [("models", run)])
    text = " ".join(Outline((tmp_path / "page.html").read_text(encoding="utf-8")).text.split())
    assert "sagan training step, 16×64×64, fp32 12,346 ms, 324 GFLOP/s, 65 % of the machine's" in text
    assert "8.5 M parameters eager 2.00×" in text
    assert "Growth" not in text


def test_the_roofline_has_what_has_operations_and_bytes() -> None:
    def of(op: str, top: Row, flops: float, moved: float) -> Result:
        row = Row("gdl_kernels", flops, moved, ours=True, samples_ms=[1.0] * 3)
        return Result(op, "forward", "", "float32", None, 1, top, [row])

    copy = Row("copy of 1 MB", 0.0, 2e6, samples_ms=[0.1])
    read = Row("read of 1 MB", 0.0, 1e6, samples_ms=[0.01])
    product = Row("torch.mm 2048³, float32", 1e9, 0.0, samples_ms=[1.0])
    results = [of("adain", copy, 6e6, 8e6), of("decode", read, 1e6, 1e6), of("bert", product, 1e9, 0.0)]

    def text(*chosen: Result) -> str:
        run = json.loads(json.dumps(record.document(chosen, [], torch.device("cpu"), quick=True)))
        return "".join(f"{Outline(svg).text} " for svg in plots.rooflines([run]))

    everything = text(*results)
    assert "adain" in everything
    assert "decode" in everything
    assert "bert" not in everything, "its bytes are not known"
    assert " read " in everything, "which is faster than the copy"
    assert " copy " not in everything
    assert "matrix product, float32" in everything
    of_memory = text(results[0])
    assert " copy " in of_memory
    assert "matrix product" not in of_memory
    assert text(results[2]) == ""


def test_one_run_gives_one_page(tmp_path: Path, page: Path) -> None:
    write(tmp_path / "again.html", [("attention", a_run(date=DATE))], [ROOT / "docs" / "layouts.png"])
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_the_command_and_its_errors(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(a_run()))
    out = tmp_path / "made" / "page.html"
    result = CliRunner().invoke(app, ["page", str(tmp_path / "run.json"), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert f"to look at: {out}" in result.output
    assert out.stat().st_size > 10_000
    (tmp_path / "no.png").write_text("text")
    for arguments, why in (
        ([str(tmp_path / "missing.json")], "missing.json"),
        ([str(tmp_path / "run.json"), "--picture", str(tmp_path / "no.png")], "must be a PNG"),
        ([str(tmp_path / "run.json"), "--picture", str(tmp_path / "none.png")], "can't be read"),
    ):
        failed = CliRunner().invoke(app, ["page", *arguments, "--out", str(tmp_path / "other.html")])
        assert failed.exit_code == 2
        assert why in " ".join(failed.output.replace("│", " ").split())
        assert not (tmp_path / "other.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
@pytest.mark.parametrize("width", [500, 1200])  # 500: headless Chromium makes no narrower window
def test_a_browser_shows_it(page: Path, tmp_path: Path, width: int) -> None:
    """Nothing is wider than the window, and every section leaves ink."""
    probe = tmp_path / "probe.html"
    measure = (
        "<script>onload = () => { document.title = ["
        "document.documentElement.scrollWidth, innerWidth, ...[...document.querySelectorAll('figure')].map("
        "f => Math.round(f.getBoundingClientRect().height))].join(' ') }</script>"
    )
    probe.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{measure}</body>"), encoding="utf-8")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--window-size={width},4000", f"--user-data-dir={tmp_path / 'profile'}",
    ]  # fmt: skip
    dumped = subprocess.run([*command, "--dump-dom", probe.as_uri()], capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>([\d ]+)</title>", dumped.stdout)
    assert title, dumped.stderr
    scroll, inner, *figures = map(int, title[1].split())
    assert scroll <= inner
    assert len(figures) == 7  # roofline, growth, four layouts, one picture
    assert min(figures) > 80
    picture = tmp_path / "page.png"
    subprocess.run([*command, f"--screenshot={picture}", page.as_uri()], capture_output=True, timeout=120, check=True)
    with Image.open(picture) as shot:
        assert shot.width == width
        dark = sum(count for count, value in shot.convert("L").getcolors(256) or [] if value < 128)
        assert dark / (shot.width * shot.height) > 0.005
