"""Prompt sets: the benchtop's own, and lists from files, each known by its hash.

Prompt lists in which every prompt stands several times: several images of each, of noise of their own.

The k-th copy of a prompt goes by its id and ``#k``. Noise is a function of the id, so each
copy starts from its own; with a scene, each is compared with a real scene of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rgbench.core.errors import UsageError
from rgbench.core.io import parse_json, write_text_atomic

# Caption lists that papers share, by the md5 of the file.
KNOWN_LISTS = {
    "20ed79e6a73d7b8fdbfb6ebc8c5c7e99": "coco14-30k",  # DMD2, SiD-LSG, GigaGAN: 30,000 of val2014, in file order
}

UNKNOWN = "not a list that rgbench knows"
NUM_PARTI = 1632  # PartiPrompts' rows
BENCHTOP, HPS_BENCHMARK = "benchtop", "hpsv2-benchmark"
HPS_STYLES = ("anime", "concept-art", "paintings", "photo")
HPS_PROMPTS_PER_STYLE = 800


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        id: unique in its set; with the seed it names the image.
        text: what the model reads.
        group: figures are reported per group too ("test", "heldout", a style); "" for none.
        scene: the true attributes of a benchtop scene, by name.
        seed: of the image's noise.
    """

    id: str
    text: str
    group: str = ""
    scene: dict[str, str] | None = None
    seed: int = 0


@dataclass(frozen=True)
class PromptSet:
    """An ordered list of prompts, one image each; no id comes twice with one seed.

    Attributes:
        name: for tables and protocol ids; a known list goes by its own name, and no other file does.
        prompts: the prompts, in order.
        file_md5: of the file it was read from, the hash by which papers name lists; None for the benchtop's.
        file_sha256: of the same file.
        standing: what a list that is not known by its hash is to those that papers share.
    """

    name: str
    prompts: tuple[Prompt, ...]
    file_md5: str | None = None
    file_sha256: str | None = None
    standing: str = UNKNOWN

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def published(self) -> str | None:
        """The name under which papers share this list, by its hash; None where it is none of those."""
        return KNOWN_LISTS.get(self.file_md5) if self.file_md5 else None

    @property
    def seeds(self) -> list[int]:
        """Noise seeds, in order of their first image."""
        return list(dict.fromkeys(prompt.seed for prompt in self.prompts))

    @property
    def num_distinct(self) -> int:
        """Prompts, however many seeds each has."""
        return len({prompt.id for prompt in self.prompts})

    def with_seeds(self, seeds: Iterable[int]) -> PromptSet:
        """An image of each prompt for each seed: all prompts under the first seed, then all under the next."""
        return replace(self, prompts=tuple(replace(p, seed=seed) for seed in seeds for p in self.prompts))

    @property
    def sha256(self) -> str:
        """Hash over ids and texts in order, whatever the seeds."""
        first = {prompt.id: prompt.text for prompt in self.prompts}
        rows = [list(row) for row in first.items()]
        return hashlib.sha256(json.dumps(rows, ensure_ascii=True).encode()).hexdigest()

    def first(self, num: int) -> PromptSet:
        """The set of the first ``num`` prompts.

        Raises:
            UsageError: there are fewer, or ``num`` is not positive.
        """
        if not 1 <= num <= len(self):
            raise UsageError(f"{self.name}: cannot take {num} of {len(self)} prompts; ask for 1 to {len(self)}")
        return replace(self, prompts=self.prompts[:num])

    def describe(self) -> str:
        """One line for the terminal: name, count and hashes, and whether papers know the list."""
        seeds = f" × {len(self.seeds)} seeds" if len(self.seeds) > 1 else ""
        count = f"{self.num_distinct} prompts{seeds}"
        if self.file_md5 is None:
            files = f", files sha256 {self.file_sha256}" if self.file_sha256 else ""
            return f"{self.name}: {count}, sha256 {self.sha256[:16]}{files}"
        known = "a published list" if self.published else self.standing
        return f"{self.name}: {count}, {known}, file md5 {self.file_md5}, sha256 {self.file_sha256}"


def benchtop_prompts(num: int = 2048) -> PromptSet:
    """Captions of benchtop scenes that no student saw; every fourth holds a held-out combination.

    Args:
        num: how many; a smaller set is the beginning of a larger one.
    """
    from rgbench.benchtop.scenes import (
        captions,  # torch: not wanted by those who only read files
        sample_scenes,
    )

    prompts: dict[int, Prompt] = {}
    for split, indices in (
        ("test", [i for i in range(num) if i % 4 != 3]),
        ("heldout", [i for i in range(num) if i % 4 == 3]),
    ):
        scenes = sample_scenes(split, indices)
        for row, (index, text) in enumerate(zip(indices, captions(scenes, split, indices), strict=True)):
            prompts[index] = Prompt(f"{split}/{index}", text, split, scenes.to_dict(row))
    return PromptSet(BENCHTOP, tuple(prompts[i] for i in range(num)))


def load_prompts(path: str | Path) -> PromptSet:
    """Read a prompt file, by its suffix, or the folder of HPSv2's benchmark.

    ``.txt``: one prompt per line. ``.jsonl``: an object per line with ``text`` and,
    if wished, ``id``, ``group`` and ``scene``. ``.json``: COCO captions
    (``captions_val2014.json``), the caption of lowest id for each image, by image id.
    ``.tsv``: PartiPrompts, columns Prompt and Category, the categories as groups; where it has not
    its 1,632 rows, the list says so. A folder: HPSv2's four lists of 800, the styles as groups.

    Args:
        path: the file or folder.

    Raises:
        UsageError: no such file, another suffix, not UTF-8, no prompt in it, a broken row, an id twice.
    """
    path = Path(path)
    if path.is_dir():
        return _read_hps_benchmark(path)
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".json": _read_coco, ".tsv": _read_parti}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UsageError(
            f"{path}: prompts are read from .txt, .jsonl, COCO captions .json, PartiPrompts .tsv "
            f"and the folder of HPSv2's benchmark, not {path.suffix!r}"
        )
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: cannot read the prompt file: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UsageError(f"{path}:{line}: not UTF-8 at byte {error.start}; save the file as UTF-8 text") from error
    prompts = tuple(reader(path, text))
    if not prompts:
        raise UsageError(f"{path}: holds no prompt; give at least one")
    _check_distinct(path, prompts)
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    standing = _parti_standing(len(prompts)) if reader is _read_parti else UNKNOWN
    return PromptSet(_name(path, md5), prompts, md5, hashlib.sha256(data).hexdigest(), standing)


def _name(path: Path, md5: str) -> str:
    """A known list's own; else the file's, whole where its stem is the name of such a list."""
    taken = {*KNOWN_LISTS.values(), BENCHTOP, HPS_BENCHMARK}
    return KNOWN_LISTS.get(md5) or (path.name if path.stem in taken else path.stem)


def _read_txt(path: Path, text: str) -> Iterable[Prompt]:
    for number, line in enumerate(text.split("\n")):
        if "\r" in line.strip() or "\0" in line:  # else a whole file of such line ends is one prompt
            raise UsageError(f"{path}:{number + 1}: a lone carriage return or a NUL; end lines with line feeds")
        if line.strip():
            yield Prompt(f"{path.stem}/{number}", line.strip())


def _read_jsonl(path: Path, text: str) -> Iterable[Prompt]:
    for number, line in enumerate(text.split("\n")):
        if not line.strip():
            continue
        where = f"{path}:{number + 1}"
        row = _parse_json(line, where)
        unknown = set(row) - {"text", "id", "group", "scene"} if isinstance(row, dict) else {"(not an object)"}
        if unknown:
            raise UsageError(
                f"{where}: expected an object with text, id, group, scene; got {', '.join(sorted(unknown))}"
            )
        if not isinstance(row.get("text"), str) or not row["text"].strip():
            raise UsageError(f"{where}: 'text' is missing or empty; every row needs a prompt")
        _check_scene(row.get("scene"), where)
        identity, group = row.get("id", f"{path.stem}/{number}"), row.get("group", "")
        if type(identity) not in (str, int) or not isinstance(group, str):
            raise UsageError(f"{where}: 'id' must be a text or a whole number, and 'group' a text")
        yield Prompt(str(identity), row["text"].strip(), group, row.get("scene"))


def _check_scene(scene: Any, where: str) -> None:
    """A scene that does not survive a round trip lacks an attribute or holds a wrong one."""
    from rgbench.benchtop.scenes import Scenes

    if scene is None:
        return
    try:
        whole = isinstance(scene, dict) and Scenes.from_dicts([scene]).to_dict(0) == scene
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error
    if not whole:
        raise UsageError(f"{where}: 'scene' is not a whole scene: layout, and shape, colour, size of each object")


def _read_coco(path: Path, text: str) -> Iterable[Prompt]:
    document = _parse_json(text, str(path))
    annotations = document.get("annotations") if isinstance(document, dict) else None
    if not isinstance(annotations, list):
        raise UsageError(f"{path}: not COCO captions: expected an object with a list 'annotations'")
    first: dict[int, tuple[int, str]] = {}
    for number, row in enumerate(annotations):
        try:
            image, key, caption = int(row["image_id"]), int(row["id"]), row["caption"].strip()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"{path}: annotation {number} lacks image_id, id or caption ({error!r})") from error
        if caption and (image not in first or key < first[image][0]):
            first[image] = key, caption
    for image, (_, caption) in sorted(first.items()):
        yield Prompt(f"coco/{image}", caption)


def _read_parti(path: Path, text: str) -> Iterable[Prompt]:
    header, *lines = text.split("\n")
    columns = header.rstrip("\r").split("\t")
    if not {"Prompt", "Category"} <= set(columns):
        raise UsageError(f"{path}:1: not PartiPrompts: expected the columns Prompt and Category, found {columns}")
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        row = dict(zip(columns, line.rstrip("\r").split("\t"), strict=False))
        if not row.get("Prompt", "").strip():
            raise UsageError(f"{path}:{number + 2}: no prompt in this row")
        yield Prompt(f"{path.stem}/{number}", row["Prompt"].strip(), row.get("Category", "").strip())


def _parti_standing(num: int) -> str:
    """How a list in PartiPrompts' form stands to the published one."""
    if num == NUM_PARTI:
        return f"as many as PartiPrompts' {NUM_PARTI:,}"
    return f"not PartiPrompts as published: {num:,} prompts, not {NUM_PARTI:,}"


def _read_hps_benchmark(folder: Path) -> PromptSet:
    """Four styles of 800 prompts each, ``{style}.json``: a list of texts, as ``hpsv2.benchmark_prompts`` reads them."""
    prompts: list[Prompt] = []
    digest = hashlib.sha256()
    for style in HPS_STYLES:
        path = folder / f"{style}.json"
        if not path.is_file():
            raise UsageError(f"{path}: missing; HPSv2's benchmark has {', '.join(f'{s}.json' for s in HPS_STYLES)}")
        data = path.read_bytes()
        digest.update(data)
        try:
            texts = _parse_json(data.decode("utf-8-sig"), str(path))
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: not UTF-8 at byte {error.start}; fetch it again") from error
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise UsageError(f"{path}: expected a list of prompts; fetch it again")
        if len(texts) != HPS_PROMPTS_PER_STYLE:
            raise UsageError(f"{path}: {len(texts)} prompts; the benchmark has {HPS_PROMPTS_PER_STYLE} of each style")
        prompts += [Prompt(f"{style}/{i:05d}", text.strip(), style) for i, text in enumerate(texts)]
    return PromptSet(HPS_BENCHMARK, tuple(prompts), None, digest.hexdigest())


def _parse_json(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not valid JSON: {error}") from error


def _check_distinct(path: Path, prompts: tuple[Prompt, ...]) -> None:
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise UsageError(f"{path}: the id {prompt.id!r} occurs twice; images are named by it")
        seen.add(prompt.id)


COPY = re.compile(r"#\d+$")


def repeat_prompts(prompts: PromptSet, times: int) -> PromptSet:
    """Each prompt ``times`` times in a row.

    Raises:
        UsageError: fewer than two times.
    """
    if times < 2:
        raise UsageError(f"repeat prompts at least 2 times, not {times}")
    copies = [replace(prompt, id=f"{prompt.id}#{k}") for prompt in prompts.prompts for k in range(times)]
    return PromptSet(f"{prompts.name} × {times}", tuple(copies))


def without_copy(prompt_id: str) -> str:
    """The id of the prompt that a copy was made of; of any other, its own."""
    return COPY.sub("", prompt_id)


def write_prompts(prompts: PromptSet, path: Path) -> Path:
    """Write a list as .jsonl, with groups and scenes, to be given to ``rgbench eval --prompts``.

    Raises:
        UsageError: the file is no .jsonl, or is there already.
    """
    if path.suffix != ".jsonl":
        raise UsageError(f"{path}: prompts with ids are written as .jsonl; choose such a name")
    if path.exists():
        raise UsageError(f"{path}: exists already; nothing was overwritten. Choose another name")
    rows = []
    for prompt in prompts.prompts:
        row = {"id": prompt.id, "text": prompt.text, "group": prompt.group}
        rows.append(json.dumps(row | ({"scene": prompt.scene} if prompt.scene else {}), ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, "\n".join(rows) + "\n")
    return path
