"""Votes: one file for each rater, on disk before a vote is confirmed.

    votes/{rater}.jsonl   first line: rater, kind, arena, time; then a line for each vote

A line ends with the sha256 of what it says, and counts once its line feed is there. What a killed process left of a
line is cut off with the next vote, and its question asked again. A vote's id names rater, comparison and question, so
a vote that arrives twice counts once.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from rgbench.core.config import read_as
from rgbench.core.errors import UsageError
from rgbench.core.io import SEAL, file_stem, parse_json, seal, sync_folder, unseal

SUFFIX = ".jsonl"
MAX_NAME = 60  # characters of a rater's name

Answer = Literal["left", "right", "tie"]
Kind = Literal["person", "simulated"]
M = TypeVar("M", bound=BaseModel)


class NameTaken(UsageError):
    """Another rater has this name."""


class OtherAnswer(UsageError):
    """The question was answered already, and otherwise."""


class Vote(BaseModel):
    """One answer of one rater.

    Attributes:
        id: of rater, comparison and question; signed by the arena.
        rater: name.
        pair: the two models, in the arena's order; of a check the model, and what its degraded copy is called.
        prompt: id.
        seed: of the images' noise.
        question: which of the three.
        left: what stood on the left, one of ``pair``.
        answer: the better side, or a tie.
        time: UTC, ISO 8601.
        check: whether one of the two was a degraded copy of the other.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    rater: str
    pair: tuple[str, str]
    prompt: str
    seed: int
    question: str
    left: str
    answer: Answer
    time: str
    check: bool = False

    @property
    def winner(self) -> str | None:
        """What was preferred; None for a tie."""
        if self.answer == "tie":
            return None
        first, second = self.pair
        right = second if self.left == first else first
        return self.left if self.answer == "left" else right


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    rater: str
    kind: Kind
    arena: str
    time: str


@dataclass
class Rater:
    """One rater and the votes that are on disk.

    Attributes:
        name: as typed.
        kind: a person or a simulated annotator.
        path: of the file.
        size: bytes of its complete lines.
        votes: by id, in the order given.
    """

    name: str
    kind: Kind
    path: Path
    size: int
    votes: dict[str, Vote]
    lock: Lock = field(default_factory=Lock, repr=False)

    def add(self, votes: Sequence[Vote]) -> int:
        """Append votes; they are on disk when this returns.

        Returns:
            How many were new.

        Raises:
            OtherAnswer: one was answered before, otherwise; none is stored.
            OSError: the disk refused; none is stored.
        """
        with self.lock:
            for vote in votes:
                stored = self.votes.get(vote.id)
                if stored is not None and stored.answer != vote.answer:
                    raise OtherAnswer(f"{self.name}: answered {vote.question} of {vote.prompt} already")
            new = {vote.id: vote for vote in votes if vote.id not in self.votes}
            if new:
                self._append("".join(map(_line, new.values())).encode())
                self.votes |= new
            return len(new)

    def _append(self, data: bytes) -> None:
        descriptor = os.open(self.path, os.O_WRONLY)
        try:
            os.ftruncate(descriptor, self.size)  # cuts what a killed process left of a line
            rest = memoryview(data)
            while rest:
                rest = rest[os.pwrite(descriptor, rest, self.size + len(data) - len(rest)) :]
            os.fsync(descriptor)
        except OSError as error:
            os.ftruncate(descriptor, self.size)
            error.filename = str(self.path)
            raise
        finally:
            os.close(descriptor)
        self.size += len(data)


class Votes:
    """The raters of one arena.

    Args:
        folder: of their files; made where it is missing.
        arena: its id.

    Raises:
        UsageError: a file that is damaged before its end, of another arena, or a copy of a rater's; it is named.

    Attributes:
        raters: by file stem, sorted.
    """

    def __init__(self, folder: Path, arena: str) -> None:
        self.folder, self.arena = folder, arena
        folder.mkdir(parents=True, exist_ok=True)
        found = (_read(path, arena) for path in sorted(folder.glob(f"[!.]*{SUFFIX}")))
        self.raters = {rater.path.name.removesuffix(SUFFIX): rater for rater in found if rater is not None}
        self._lock = Lock()

    def join(self, name: str, kind: Kind = "person") -> Rater:
        """Add a rater; the file is on disk when this returns.

        Args:
            name: not empty, at most 60 characters.
            kind: a person or a simulated annotator.

        Raises:
            NameTaken: there is a rater of this name.
        """
        stem = file_stem(name)
        header = _Header(rater=name, kind=kind, arena=self.arena, time=now())
        with self._lock:
            if stem in self.raters:
                raise NameTaken(f"a rater is called {name!r} already; choose another name, or open your own link")
            rater = Rater(name, kind, self.folder / f"{stem}{SUFFIX}", 0, {})
            rater.path.touch()
            rater._append(_line(header).encode())
            sync_folder(self.folder)
            self.raters[stem] = rater
        return rater


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the folder of votes: one process alone may add to it.

    Raises:
        UsageError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{folder}: another process adds votes; stop that one first") from error
        yield
    finally:
        os.close(descriptor)


def now() -> str:
    """UTC time, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read(path: Path, arena: str) -> Rater | None:
    """A rater's complete lines; None where not even the first one is whole.

    A killed write leaves the beginning of a line. A line that is whole up to its line feed, with another byte in its
    place, was damaged later.
    """
    if not path.is_file():
        raise UsageError(f"{path}: not a file of votes; move it away")
    data = path.read_bytes()
    size = data.rfind(b"\n") + 1
    if data[-2:-1] == b"}" and _is_sealed(data[size:-1]):
        raise UsageError(f"{path}: its last line feed is damaged; mend or remove the line")
    first, *lines = data[:size].split(b"\n")[:-1] or [b""]
    if not size:
        return None
    header = _parse(_Header, first, f"{path}:1")
    if header.arena != arena:
        raise UsageError(f"{path}: votes of another arena ({header.arena}); move the file away")
    own = f"{file_stem(header.rater)}{SUFFIX}"
    if path.name != own:
        raise UsageError(f"{path}: votes of {header.rater}, which belong into {own}; keep one file, under that name")
    votes: dict[str, Vote] = {}
    for number, line in enumerate(lines, 2):
        vote = _parse(Vote, line, f"{path}:{number}")
        if vote.rater != header.rater or votes.setdefault(vote.id, vote).answer != vote.answer:
            raise UsageError(f"{path}:{number}: another rater's vote, or a second answer; remove the line")
    return Rater(header.rater, header.kind, path, size, votes)


def _parse(kind: type[M], line: bytes, where: str) -> M:
    try:
        content = parse_json(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not valid JSON ({error}); mend or remove the line") from error
    remedy = "mend or remove the line"
    return read_as(kind, unseal(content, where, remedy), f"{where}: not a vote", remedy)


def _line(of: BaseModel) -> str:
    return json.dumps(seal(of.model_dump()), ensure_ascii=False) + "\n"


def _is_sealed(line: bytes) -> bool:
    try:
        return SEAL in parse_json(line)
    except (ValueError, RecursionError, TypeError):
        return False
