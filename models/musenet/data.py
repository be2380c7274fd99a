"""The Bach chorales that music21 ships, as notes and as tokens."""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from ..atomic import replacing, writable
from ..cache import cache_directory
from .midi import VOICES
from .tokens import TICKS_PER_BEAT, Note, Tempo, Vocabulary

#: One piece in this many is held out.
HELD_OUT = 10

#: More pieces than this are parsed in several processes; for fewer, starting those takes longer than it saves.
PARSED_ALONE = 16


@dataclass(frozen=True)
class Piece:
    """A piece, and whether it is kept from training."""

    name: str
    notes: tuple[Note, ...]
    held_out: bool
    tempos: tuple[Tempo, ...] = ()
    composer: str | None = None


def chorales(limit: int | None = None, *, processes: int = 2) -> list[Piece]:
    """The chorales in four voices, always in the same mixed order.

    The first ``limit`` of them are thus a sample of all. Which are held out is decided by their place in that order, so
    that a piece is on the same side whatever the limit.

    The first call parses them from MusicXML, which takes about a tenth of a second each, and keeps the notes in
    :func:`cache_directory`.

    Args:
        limit: how many pieces; all, some 400, by default.

    Raises:
        ValueError: if ``limit`` is not positive, or the cache lacks pieces and can't be written.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 piece, got {limit}")
    from music21 import corpus

    sources = [path for path in corpus.getComposer("bach") if path.name.startswith("bwv") and path.suffix == ".mxl"]
    sources.sort(key=lambda path: (zlib.crc32(path.stem.encode()), path.stem))
    sources = sources[:limit]
    version = importlib.metadata.version("music21")
    folder = cache_directory() / "chorales" / f"music21-{version}-grid-{TICKS_PER_BEAT}"
    missing = [source for source in sources if _cached(folder, source) is None]
    if missing:
        writable(folder / f"{missing[0].stem}.json")
    with ExitStack() as stack:
        parsed: Iterable[list[Note]] = map(_parse, missing)
        if len(missing) > PARSED_ALONE:
            # Not forked: this process may have threads by now, and a fork keeps their locks without them.
            spawning = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(processes, mp_context=spawning))
            parsed = track(pool.map(_parse, missing, chunksize=4), "Reading chorales", len(missing), transient=True)
        for source, notes in zip(missing, parsed):
            with replacing(folder / f"{source.stem}.json") as temporary:
                temporary.write_text(json.dumps([astuple(note) for note in notes]))
    pieces = [
        Piece(source.stem, tuple(_cached(folder, source) or ()), held_out=place % HELD_OUT == 0)
        for place, source in enumerate(sources)
    ]
    return [piece for piece in pieces if piece.notes]


def _cached(folder: Path, source: Path) -> list[Note] | None:
    try:
        return [Note(*fields) for fields in json.loads((folder / f"{source.stem}.json").read_text())]
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):  # not there, or damaged: parse it again
        return None


def _parse(source: Path) -> list[Note]:
    """The notes of the four voices; none if the score lacks one. Other instruments in it only double the voices."""
    from music21 import converter

    score: Any = converter.parse(source)
    parts = {part.partName.lower(): part for part in score.parts if part.partName}
    if not all(voice in parts for voice in VOICES):
        return []
    notes: list[Note] = []
    for voice in VOICES:
        for element in parts[voice].stripTies().flatten().notes:
            start = round(element.offset * TICKS_PER_BEAT)
            duration = round(element.quarterLength * TICKS_PER_BEAT)
            if duration:  # a grace note has none
                notes.extend(Note(start, duration, voice, pitch.midi) for pitch in element.pitches)
    return sorted(notes)


def encoded(piece: Piece, vocabulary: Vocabulary) -> Tensor:
    """A piece as tokens: int32 ``(tokens,)``, as many may have to fit in memory."""
    tokens = vocabulary.encode(piece.notes, tempos=piece.tempos, composer=piece.composer)
    return torch.tensor(tokens, dtype=torch.int32)


def stream(pieces: Sequence[Piece], vocabulary: Vocabulary) -> Tensor:
    """Pieces on end as one stream of tokens: int64 ``(tokens,)``."""
    return torch.cat([encoded(piece, vocabulary) for piece in pieces]).long()
