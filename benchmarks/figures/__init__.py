"""The figures in README.md and docs: tables that are made of result files, and differ from them in no digit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from models.atomic import replacing

from .block import END, Block, Mistake, blocks, of_line
from .sources import Results, Source, read
from .table import caption, table


@dataclass(frozen=True)
class Difference:
    """A block that differs from its result files, at the first line that does."""

    document: Path
    line: int
    has: str
    must_have: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}: has {self.has!r}, but its result files say {self.must_have!r}"


def documents(root: Path) -> list[Path]:
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def differences(root: Path) -> list[Difference]:
    """What in the documents of the checkout ``root`` differs from ``benchmarks/results``. Changes nothing.

    Raises:
        ValueError: naming the document and its line, where a block can't be made.
    """
    return [difference for path in documents(root) for difference in _made(path, root)[1]]


def rewrite(root: Path) -> list[Path]:
    """Write the figures anew. Returns the documents that changed; raises as :func:`differences` does, changing none."""
    made = [(path, *_made(path, root)) for path in documents(root)]
    changed = [(path, text) for path, text, different in made if different]
    for path, text in changed:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [path for path, _ in changed]


def _made(document: Path, root: Path) -> tuple[str, list[Difference]]:
    """The document as it must be, and where it is not."""
    results = root / "benchmarks" / "results"
    lines = document.read_text(encoding="utf-8").split("\n")
    out: list[str] = []
    different: list[Difference] = []
    copied = 0
    try:
        for block in blocks(lines):
            begin, end = block.body
            body = _body(block, document, results)
            out += lines[copied:begin] + body
            copied = end
            for i, (has, must_have) in enumerate(zip(lines[begin : end + 1], [*body, END])):
                if has != must_have:
                    different.append(Difference(document.relative_to(root), begin + i + 1, has, must_have))
                    break
    except Mistake as mistake:
        raise ValueError(f"{document.relative_to(root)}:{mistake.line}: {mistake}") from mistake
    return "\n".join(out + lines[copied:]), different


def _body(block: Block, document: Path, results: Path) -> list[str]:
    sources: list[Source] = []
    for file in block.files:
        with of_line(file.line):
            sources.append(read(results / file.value))
    made = f"\n{table(block, Results(sources))}\n\n{caption(sources, document, results)}\n"
    return made.split("\n")
