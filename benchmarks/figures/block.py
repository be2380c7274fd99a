"""What a document asks for: the comment above a table of figures.

    <!-- figures
    from epyc-2.4ghz-avx2/adain.json
    columns adain: forward, *, fp32
      ours = **{time}**
      over eager = {speed-up over eager}
    rows pixels
      16² = 4×512×16×16
      64² = 4×256×64×64
    -->

    ... the table, which is generated ...

    <!-- /figures -->

``docs/benchmarks.md`` tells what each line means.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

BEGIN, END = "<!-- figures", "<!-- /figures -->"

#: A line that means to be one of the two, and so must be.
_MARKER = re.compile(r"<!--\s*/?\s*figures?\b")


class Mistake(ValueError):
    """What is wrong in a document, and in which line of it."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


@contextmanager
def of_line(line: int) -> Iterator[None]:
    """What is found wrong inside is a mistake in ``line``."""
    try:
        yield
    except Mistake:
        raise
    except ValueError as error:
        raise Mistake(line, str(error)) from error


@dataclass(frozen=True)
class Entry:
    """``label = value``, and the number of its line."""

    label: str
    value: str
    line: int


@dataclass(frozen=True)
class Columns:
    """Columns whose cells are about the cases ``pattern``, where ``*`` stands for the row's value."""

    pattern: str
    entries: list[Entry] = field(default_factory=list)


@dataclass(frozen=True)
class Block:
    """One comment with what is generated below it.

    Attributes:
        line: where it begins.
        body: the indices of the lines that are generated: the first, and the one past the last.
        files: below ``benchmarks/results``; label and value are the same.
        corner: the heading of the first column.
    """

    line: int
    body: tuple[int, int]
    files: list[Entry]
    columns: list[Columns]
    rows: list[Entry]
    corner: str


def blocks(lines: Sequence[str]) -> Iterator[Block]:
    """The blocks of a document; what is in a code fence is none.

    Raises:
        Mistake: at a marker that is misspelt, has no partner, or asks for what can't be understood.
    """
    fenced, i = False, 0
    while i < len(lines):
        if lines[i].startswith("```"):
            fenced = not fenced
        elif not fenced and lines[i] == BEGIN:
            closed = _find("-->", lines, i)
            end = _find(END, lines, closed)
            yield _parsed(lines, i, closed, end)
            i = end
        elif not fenced and _MARKER.match(lines[i]):
            raise Mistake(i + 1, f"a marker must be {BEGIN!r}, or {END!r} after one, got {lines[i]!r}")
        i += 1


def _find(end: str, lines: Sequence[str], begin: int) -> int:
    for i in range(begin + 1, len(lines)):
        if lines[i] == end:
            return i
        if _MARKER.match(lines[i]):
            break
    raise Mistake(begin + 1, f"{lines[begin]!r} must be followed by {end!r}")


def _parsed(lines: Sequence[str], begin: int, closed: int, end: int) -> Block:
    files: list[Entry] = []
    columns: list[Columns] = []
    rows: list[Entry] = []
    corner = ""
    entries: list[Entry] | None = None
    for number, line in enumerate(lines[begin + 1 : closed], begin + 2):
        keyword, _, rest = line.partition(" ")
        if line.startswith("  "):
            if entries is None:
                raise Mistake(number, f"must come after `columns` or `rows`, got {line.strip()!r}")
            label, equals, value = line.strip().partition(" = ")
            if not equals and entries is not rows:
                raise Mistake(number, f"a column must be `heading = cell`, got {line.strip()!r}")
            entries.append(Entry(label.strip(), (value if equals else label).strip(), number))
        elif keyword == "from" and rest:
            files.append(Entry(rest, rest, number))
        elif keyword == "columns":
            columns.append(Columns(rest or "*"))
            entries = columns[-1].entries
        elif keyword == "rows":
            corner, entries = rest, rows
        else:
            raise Mistake(number, f"must be `from FILE`, `columns`, `rows`, or indented below these, got {line!r}")
    for what, there in (("from FILE", files), ("columns", any(c.entries for c in columns)), ("rows", rows)):
        if not there:
            raise Mistake(begin + 1, f"has no `{what}`")
    return Block(begin + 1, (closed + 1, end), files, columns, rows, corner)
