"""Contest: the models, prompts and images of one arena, and what it signs.

    {arena}/arena.json   models, prompts, seed, sha256 of the images
    {arena}/secret       signs links, questions and image ids; never leaves the machine
    {arena}/votes/       one file a rater

A page learns of an image its pixels and a random id alone: every image is encoded again, without metadata, and ids and
tickets are keyed hashes, other ones for each rater.
"""

from __future__ import annotations

import glob
import hashlib
import hmac
import io
import json
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from itertools import combinations
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict

from rgbench.arena.pairs import DEGRADED, QUESTIONS, Comparison, plan
from rgbench.arena.votes import Answer, OtherAnswer, Rater, Vote, Votes, held, now
from rgbench.core.config import read_as
from rgbench.core.errors import UsageError
from rgbench.core.io import (
    INDEX,
    canonical_sha256,
    file_stem,
    inspect_image,
    is_folder_name,
    open_image,
    read_json,
    seal,
    sha256_file,
    unseal,
    write_json_atomic,
    write_synced,
)
from rgbench.data.files import image_files
from rgbench.data.prompts import BENCHTOP, PromptSet, benchtop_prompts, load_prompts
from rgbench.evaluate.images import list_images, match_images, named, own_prompts, own_rows
from rgbench.evaluate.results import RESULT, ModelResult, load_result

DESIGN, SECRET, VOTES = "arena.json", "secret", "votes"
NUM_BENCHTOP = 2048
SIGNATURE = 32  # hex digits of a keyed hash
SHRUNK, GREY = 10, 0.4  # of a degraded copy: shrunk tenfold and back, then mixed with grey
CACHED_IMAGES = 512

Key = tuple[str, int, str]  # prompt id, noise seed, text


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Sources(_Frozen):
    """Where images come from, as the user says it.

    Attributes:
        models: names in ``results``, folders of results, or folders of images.
        prompts: "benchtop" or a file, for folders of images without a table of their own.
        num: the first prompts alone; None for all.
        results: the results folder.
    """

    models: tuple[str, ...]
    prompts: str | None = None
    num: int | None = None
    results: str = "results"


class Contestant(_Frozen):
    """One model: its name, the sha256 of its images, the folder of its result."""

    name: str
    sha256: str
    result: str | None


class ArenaPrompt(_Frozen):
    """One prompt with the seed of its images' noise."""

    id: str
    seed: int
    text: str


class Design(_Frozen):
    """What ``arena.json`` holds: everything but secrets and votes.

    Attributes:
        sources: as given first; where the next command names no model, these are taken.
        seed: of the order in which comparisons are asked.
        models: in the order given.
        prompts: in the order of the images.
    """

    schema_version: Literal[1] = 1
    sources: Sources
    seed: int
    models: tuple[Contestant, ...]
    prompts: tuple[ArenaPrompt, ...]

    @cached_property
    def id(self) -> str:
        """8 hex digits over models, images, prompts and seed."""
        fields = self.model_dump(include={"seed", "prompts"}) | {"models": [[m.name, m.sha256] for m in self.models]}
        return canonical_sha256(json.loads(json.dumps(fields)))[:8]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models."""
        return tuple(model.name for model in self.models)


@dataclass(frozen=True, eq=False)
class Entrant:
    """A model's images.

    Attributes:
        name: of the model.
        keys: of its prompts.
        images: files, or images of a contact sheet, in the order of ``keys``.
        sha256: of all of them.
        result: folder of its result; None where there is none.
    """

    name: str
    keys: tuple[Key, ...]
    images: tuple[Path | Image.Image, ...]
    sha256: str
    result: Path | None

    def size(self, position: int) -> tuple[int, int]:
        """Width and height of an image."""
        image = self.images[position]
        return inspect_image(image).size if isinstance(image, Path) else image.size

    def image(self, position: int) -> Image.Image:
        """An image in 8-bit RGB, upright."""
        image = self.images[position]
        return open_image(image, upright=True) if isinstance(image, Path) else image


# Where images come from


def find_entrants(sources: Sources) -> list[Entrant]:
    """The models of an arena, with their images.

    Raises:
        UsageError: fewer than two models, one that is not found or has no images, models with different prompts, or
            images of different sizes.
    """
    if len(set(sources.models)) < max(2, len(sources.models)):
        raise UsageError("an arena compares two models or more; name each once")
    found = [_entrant(text, sources) for text in sources.models]
    labels = [entrant.name for entrant in found]
    named = [
        Entrant(e.name if labels.count(e.name) == 1 else text, e.keys, e.images, e.sha256, e.result)
        for text, e in zip(sources.models, found, strict=True)
    ]
    for other in named[1:]:
        _check_alike(named[0], other)
    return named


def _check_alike(one: Entrant, other: Entrant) -> None:
    if one.keys != other.keys:
        raise UsageError(
            f"{one.name} and {other.name} have different prompts ({len(one.keys)} and {len(other.keys)} images); "
            "evaluate both on one list, or take the first prompts that both have with --num"
        )
    for position, (prompt_id, _, _) in enumerate(one.keys):
        sizes = [entrant.size(position) for entrant in (one, other)]
        if sizes[0] != sizes[1]:
            (w, h), (v, k) = sizes
            raise UsageError(
                f"{one.name} and {other.name} have images of different sizes ({w}×{h} and {v}×{k} of {prompt_id!r}), "
                "which would tell them apart; resize one of them"
            )


def _entrant(text: str, sources: Sources) -> Entrant:
    result = find_result(text, Path(sources.results))
    if result is not None:
        return _of_result(result, sources.num)
    path = Path(text)
    if path.is_dir() and image_files(path):
        return _of_folder(path, sources)
    raise UsageError(f"{text!r}: no model of {sources.results} and no folder of images; see: rgbench ls results")


def find_result(text: str, results: Path) -> ModelResult | None:
    """The result of a name or folder; None where there is none.

    Raises:
        UsageError: several, of other sampler settings or worlds; they are named.
    """
    path = Path(text)
    if path.is_dir():
        folders = [path] if (path / RESULT).is_file() else [file.parent for file in sorted(path.glob(f"*/{RESULT}"))]
    elif is_folder_name(text):
        folders = [file.parent for file in sorted(results.glob(f"*/{glob.escape(text)}/*/{RESULT}"))]
    else:
        return None
    finished = [result for result in map(load_result, folders) if not result.is_checkpoint]
    if len(finished) > 1:
        listed = ", ".join(str(result.folder) for result in finished)
        raise UsageError(f"{text}: {len(finished)} results ({listed}); name the folder of one")
    return finished[0] if finished else None


def _of_result(result: ModelResult, num: int | None) -> Entrant:
    """Images that ``--save-images`` wrote, else those of the contact sheet.

    Raises:
        UsageError: too few, one that is missing, or another one than the contact sheet keeps.
    """
    assert result.folder is not None
    saved, name = result.folder / "images", result.head.model
    images: tuple[Path | Image.Image, ...]
    if (saved / INDEX).is_file():
        rows, files = own_rows(saved, 0) or [], list_images(saved)
        remedy = "evaluate it again with --save-images"
        if missing := [row["stem"] for row in rows if row["stem"] not in files]:
            raise UsageError(f"{saved}: {len(missing)} images are missing: {named(missing)}; {remedy}")
        keys = tuple((row["id"], 0, row["text"]) for row in rows)
        images = paths = tuple(files[row["stem"]] for row in rows)
        kept = {(about.prompt_id, about.seed, about.prompt): image for about, image in result.images.items()}
        for key, file in zip(keys, paths, strict=True):
            if key in kept and open_image(file).tobytes() != kept[key].tobytes():
                raise UsageError(f"{file}: not the image that was measured; {remedy}")
    else:
        keys = tuple((about.prompt_id, about.seed, about.prompt) for about in result.images)
        images = tuple(result.images.values())
    if len(keys) < max(1, num or 0):
        raise UsageError(f"{name}: keeps {len(keys)} images; evaluate it again with --save-images, or lower --num")
    keys, images = keys[:num], images[:num]
    return Entrant(name, keys, images, _digest(images), result.folder)


def _of_folder(path: Path, sources: Sources) -> Entrant:
    known = _prompts(path, sources.prompts)
    wanted = known.first(sources.num) if sources.num else known
    files = tuple(match_images(path, wanted, known, 0))
    keys = tuple((prompt.id, prompt.seed, prompt.text) for prompt in wanted.prompts)
    return Entrant(path.resolve().name, keys, files, _digest(files), None)


def _prompts(path: Path, prompts: str | None) -> PromptSet:
    if prompts is None:
        return own_prompts(path, 0)
    return benchtop_prompts(NUM_BENCHTOP) if prompts == BENCHTOP else load_prompts(prompts)


def _digest(images: Sequence[Path | Image.Image]) -> str:
    digest = hashlib.sha256()
    for image in images:
        each = sha256_file(image) if isinstance(image, Path) else hashlib.sha256(image.tobytes()).hexdigest()
        digest.update(f"{each}\n".encode())
    return digest.hexdigest()


# The arena's folder


def read_design(folder: Path) -> Design:
    """The design of an arena.

    Raises:
        UsageError: none there, or a damaged one.
    """
    file = folder / DESIGN
    if not file.is_file():
        raise UsageError(f"{folder}: no arena here; begin one with: rgbench arena MODEL MODEL --out {folder}")
    remedy = "begin another with --out"
    return read_as(Design, unseal(read_json(file), file, remedy), f"{file}: not an arena", remedy)


def read_votes(folder: Path, design: Design) -> Votes:
    """The votes of an arena, each on something that its raters are asked.

    Raises:
        UsageError: as :class:`Votes`; or a vote on a model, prompt or question that the arena lacks, or a second one of
            a rater on one comparison.
    """
    votes = Votes(folder / VOTES, design.id)
    prompts = {(prompt.id, prompt.seed) for prompt in design.prompts}
    pairs = {False: set(combinations(design.names, 2)), True: {(name, DEGRADED) for name in design.names}}
    for rater in votes.raters.values():
        answered = set()
        for vote in rater.votes.values():
            asked = vote.pair in pairs[vote.check] and vote.left in vote.pair
            asked = asked and (vote.prompt, vote.seed) in prompts and vote.question in QUESTIONS
            comparison = (vote.pair, vote.prompt, vote.seed, vote.question)
            if not asked or (comparison in answered and not vote.check):
                what = "answered twice" if asked else "not asked in this arena"
                raise UsageError(
                    f"{rater.path}: {vote.question!r:.40} of {vote.pair} on {vote.prompt!r:.60} is {what}; "
                    "remove the line"
                )
            answered.add(comparison)
    return votes


@contextmanager
def open_contest(folder: Path, sources: Sources | None, seed: int) -> Iterator[Contest]:
    """Begin an arena, or continue the one that is there; nobody else adds votes meanwhile.

    Args:
        folder: of the arena.
        sources: None for those of the arena that is there.
        seed: of a new arena's order.

    Raises:
        UsageError: as :func:`find_entrants`, :func:`read_votes`; the folder holds an arena of other models, prompts or
            images; its secret is lost or another's; or another process adds votes.
    """
    stored = read_design(folder) if (folder / DESIGN).is_file() or sources is None else None
    sources = sources or (stored.sources if stored else None)
    assert sources is not None
    entrants = find_entrants(sources)
    design = Design(
        sources=sources,
        seed=stored.seed if stored else seed,
        models=tuple(
            Contestant(name=e.name, sha256=e.sha256, result=str(e.result) if e.result else None) for e in entrants
        ),
        prompts=tuple(ArenaPrompt(id=i, seed=s, text=t) for i, s, t in entrants[0].keys),
    )
    if stored and stored.id != design.id:
        same = stored.names == design.names and stored.prompts == design.prompts
        what = "whose images have changed since" if same else f"on {len(stored.prompts)} prompts, not this one"
        raise UsageError(f"{folder}: holds an arena of {', '.join(stored.names)} {what}; name another with --out")
    with held(folder / VOTES):
        if not stored:
            write_json_atomic(folder / DESIGN, seal(design.model_dump()))
        votes = read_votes(folder, design)
        contest = Contest(design, entrants, _secret(folder / SECRET, new=not votes.raters), votes)
        for rater in votes.raters.values():
            if any(contest.vote(rater, vote.id, vote.answer, vote.time) != vote for vote in rater.votes.values()):
                raise UsageError(f"{folder / SECRET}: did not sign the votes of {rater.name}; put the arena's own back")
        yield contest


def _secret(file: Path, new: bool) -> bytes:
    """Read the secret, which its owner alone may read; make one where nobody has joined."""
    if new and not os.path.lexists(file):
        write_synced(file, [secrets.token_hex(32).encode()])
        os.chmod(file, 0o600)
    secret = file.read_bytes() if file.is_file() else b""
    if not re.fullmatch(rb"[0-9a-f]{64}", secret):
        raise UsageError(f"{file}: missing or damaged, and it signed every link; put it back, or begin another arena")
    return secret


# What is asked


@dataclass(frozen=True)
class Task:
    """One question.

    Attributes:
        ticket: signed; the vote's id.
        comparison: position in the rater's plan.
        question: name.
    """

    ticket: str
    comparison: int
    question: str


@dataclass(frozen=True)
class Merged:
    """What became of the answers in one file: new, stored before, and refused ones."""

    rater: str
    new: int
    known: int
    refused: int


class Contest:
    """An arena that is open: asks raters and takes their votes; used by several threads.

    Args:
        design: of the arena.
        entrants: its models, with images.
        secret: signs.
        votes: of the raters.
    """

    def __init__(self, design: Design, entrants: Sequence[Entrant], secret: bytes, votes: Votes) -> None:
        self.design, self.votes, self._secret = design, votes, secret
        self.entrants = {entrant.name: entrant for entrant in entrants}
        self.png = lru_cache(maxsize=CACHED_IMAGES)(self._png)
        self._plans = lru_cache(maxsize=None)(self._plan)
        self._tasks = lru_cache(maxsize=None)(self._task_list)
        self._images = lru_cache(maxsize=None)(self._image_ids)

    def sign(self, *parts: str | int) -> str:
        """A keyed hash that nobody without the secret can make."""
        text = json.dumps([self.design.id, *parts]).encode()
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest()[:SIGNATURE]

    @property
    def token(self) -> str:
        """What the share link carries; with it people may join."""
        return self.sign("join")

    def key(self, rater: Rater) -> str:
        """What a rater's own link carries."""
        stem = file_stem(rater.name)
        return f"{stem}.{self.sign('rater', stem)}"

    def rater(self, key: str) -> Rater | None:
        """The rater of a key; None where it was not signed here."""
        stem, _, signature = key.rpartition(".")
        good = hmac.compare_digest(signature.encode(), self.sign("rater", stem).encode())
        return self.votes.raters.get(stem) if good else None

    def comparisons(self, rater: str) -> list[Comparison]:
        """Everything that a rater is asked, in order."""
        return self._plans(rater)

    def tasks(self, rater: str) -> dict[str, Task]:
        """Questions of a rater by ticket, in order."""
        return self._tasks(rater)

    def next_task(self, rater: Rater) -> Task | None:
        """The first question that is not answered; None at the end."""
        return next((task for ticket, task in self.tasks(rater.name).items() if ticket not in rater.votes), None)

    def vote(self, rater: Rater, ticket: str, answer: Answer, time: str = "") -> Vote | None:
        """The vote that a ticket and an answer make; None for a ticket that was not signed for this rater.

        Args:
            rater: who answers.
            ticket: of the question.
            answer: given.
            time: of the answer; now by default.
        """
        task = self.tasks(rater.name).get(ticket)
        if task is None:
            return None
        asked = self.comparisons(rater.name)[task.comparison]
        prompt = self.design.prompts[asked.prompt]
        return Vote(
            id=ticket,
            rater=rater.name,
            pair=asked.pair,
            prompt=prompt.id,
            seed=prompt.seed,
            question=task.question,
            left=asked.left,
            answer=answer,
            time=time or now(),
            check=asked.check,
        )

    def merge(self, file: Path) -> Merged:
        """Store the votes that an exported page's file holds.

        Raises:
            UsageError: not such a file, of another arena, or of a rater whom nothing was exported for.
        """
        content = read_json(file)
        if not isinstance(content, dict) or not isinstance(content.get("votes"), list):
            raise UsageError(f"{file}: not the answers of an exported page; give the file that it downloads")
        if content.get("arena") != self.design.id:
            raise UsageError(f"{file}: answers of another arena; name that one with --out")
        name = content.get("rater")
        rater = next((rater for rater in self.votes.raters.values() if rater.name == name), None)
        if rater is None:
            raise UsageError(f"{file}: no page was exported for {str(name)[:60]!r}")
        new = known = refused = 0
        for row in content["votes"]:
            vote = self._exported(rater, row)
            try:
                added = rater.add([vote]) if vote else None
            except OtherAnswer:
                added = None
            new, known, refused = new + (added == 1), known + (added == 0), refused + (added is None)
        return Merged(rater.name, new, known, refused)

    def _exported(self, rater: Rater, row: object) -> Vote | None:
        """The vote of one row; None where its ticket is not the rater's, or a field is not what it should be."""
        if not isinstance(row, dict) or row.keys() != {"ticket", "answer", "time"}:
            return None
        ticket, answer, time = row["ticket"], row["answer"], row["time"]
        if answer not in get_args(Answer) or not isinstance(ticket, str) or not isinstance(time, str):
            return None
        try:
            moment = datetime.fromisoformat(time).astimezone(UTC).isoformat(timespec="seconds")
        except (ValueError, OverflowError):
            return None
        return self.vote(rater, ticket, answer, moment)

    def image_id(self, rater: str, comparison: int, side: str) -> str:
        """The random id under which a rater gets an image."""
        return self.sign("image", rater, comparison, side)

    def shown(self, image_id: str) -> bytes | None:
        """The PNG of an id that was given to a rater; None for any other."""
        for rater in list(self.votes.raters.values()):
            if found := self._images(rater.name).get(image_id):
                comparison, side = found
                return self.side(self.comparisons(rater.name)[comparison], side)
        return None

    def side(self, asked: Comparison, side: str) -> bytes:
        """The PNG on one side of a comparison."""
        model = asked.left if side == "left" else asked.right
        intact = asked.pair[0] if asked.check else model
        return self.png(intact, asked.prompt, model == DEGRADED and asked.check)

    def _png(self, model: str, prompt: int, degrade: bool) -> bytes:
        image = self.entrants[model].image(prompt)
        image = degraded(image) if degrade else image
        out = io.BytesIO()
        Image.fromarray(np.array(image)).save(out, "PNG")  # pixels alone: no metadata
        return out.getvalue()

    def _plan(self, rater: str) -> list[Comparison]:
        return plan(self.design.names, len(self.design.prompts), self.design.seed, rater)

    def _task_list(self, rater: str) -> dict[str, Task]:
        asked = [(number, question) for number in range(len(self.comparisons(rater))) for question in QUESTIONS]
        tasks = [Task(self.sign("vote", rater, number, question), number, question) for number, question in asked]
        return {task.ticket: task for task in tasks}

    def _image_ids(self, rater: str) -> dict[str, tuple[int, str]]:
        return {
            self.image_id(rater, number, side): (number, side)
            for number in range(len(self.comparisons(rater)))
            for side in ("left", "right")
        }


def degraded(image: Image.Image) -> Image.Image:
    """A copy that anybody finds worse: shrunk tenfold and back, then mixed with grey."""
    width, height = image.size
    small = image.resize((max(1, width // SHRUNK), max(1, height // SHRUNK)), Image.Resampling.BOX)
    back = small.resize(image.size, Image.Resampling.BILINEAR)
    return Image.blend(back, Image.new("RGB", image.size, (128, 128, 128)), GREY)
