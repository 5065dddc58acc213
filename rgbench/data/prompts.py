"""Prompt sets: the benchtop's own, and lists from files, each known by its hash."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rgbench.core.errors import UsageError
from rgbench.core.io import write_text_atomic
from rgbench.data.files import INVISIBLE, check_header, clean_text, decode_text, json_lines, parse_json_text

KNOWN_LISTS = {  # caption lists that papers share, by the md5 of the file
    "20ed79e6a73d7b8fdbfb6ebc8c5c7e99": "coco14-30k",  # DMD2, SiD-LSG, GigaGAN: 30,000 of val2014, in file order
}
UNKNOWN = "not a list that rgbench knows"
NUM_PARTI = 1632  # PartiPrompts' rows
BENCHTOP, HPS_BENCHMARK = "benchtop", "hpsv2-benchmark"
HPS_STYLES = ("anime", "concept-art", "paintings", "photo")
HPS_PROMPTS_PER_STYLE = 800
Clean = Callable[[str, str], str]  # a text and its place → the text as it is used
LINE_ENDS = re.compile("[\r\v\f\x1c-\x1e\x85\u2028\u2029]")  # but for line feeds
COPY = re.compile(r"#\d+$")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        id: unique in its set; with the seed it names the image.
        text: what the model reads.
        group: metric values are reported per group too ("test", "heldout", a style); "" for none.
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
    """An ordered list of prompts, one image each; an id occurs once for each seed.

    Attributes:
        name: for tables and protocol ids; only a known list has a known list's name.
        prompts: the prompts, in order.
        file_md5: of the file it was read from, by which papers name lists; None for the benchtop's.
        file_sha256: of the same file.
        standing: how a list with an unknown hash relates to those that papers share.
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
        """The name under which papers share this list, by its hash, or None."""
        return KNOWN_LISTS.get(self.file_md5) if self.file_md5 else None

    @property
    def seeds(self) -> list[int]:
        """Noise seeds, in order of their first image."""
        return list(dict.fromkeys(prompt.seed for prompt in self.prompts))

    @property
    def num_distinct(self) -> int:
        """Number of prompts, each counted once for all seeds."""
        return len({prompt.id for prompt in self.prompts})

    def with_seeds(self, seeds: Iterable[int]) -> PromptSet:
        """One image of each prompt for each seed: all prompts under the first seed, then all under the next."""
        return replace(self, prompts=tuple(replace(p, seed=seed) for seed in seeds for p in self.prompts))

    @property
    def sha256(self) -> str:
        """Hash over ids and texts in order, without seeds."""
        first = {prompt.id: prompt.text for prompt in self.prompts}
        rows = [list(row) for row in first.items()]
        return hashlib.sha256(json.dumps(rows, ensure_ascii=True).encode()).hexdigest()

    def first(self, num: int) -> PromptSet:
        """Take the first ``num`` prompts.

        Raises:
            UsageError: there are fewer, or ``num`` is not positive.
        """
        if not 1 <= num <= len(self):
            raise UsageError(f"{self.name}: cannot take {num} of {len(self)} prompts; take 1 to {len(self)}")
        return replace(self, prompts=self.prompts[:num])

    def describe(self) -> str:
        """Describe the list in one line: name, count, hashes, and whether papers share it."""
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
        num: number of prompts; a smaller set is the beginning of a larger one.
    """
    from rgbench.benchtop.scenes import captions, sample_scenes  # torch: not wanted by those who only read files

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

    ``.txt``: one prompt per line. ``.jsonl``: an object per line with ``text`` and, optionally, ``id``, ``group`` and
    ``scene``. ``.json``: COCO captions (``captions_val2014.json``), the caption of lowest id for each image, by image
    id. ``.tsv``: PartiPrompts, columns Prompt and Category, the categories as groups; with another number of rows than
    1,632, the list says so. A folder: HPSv2's four lists of 800, the styles as groups.

    Characters that nobody sees are left out of the texts, with a warning; lists that papers share stay as they are.

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
    except OSError as error:
        raise UsageError(f"{path}: cannot read the prompt file: {error.strerror}") from error
    text = decode_text(data, path)
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if md5 in KNOWN_LISTS:
        prompts = tuple(reader(path, text, _strip))
    else:
        _warn_of_invisible(path, text)
        prompts = tuple(reader(path, text, clean_text))
    if not prompts:
        raise UsageError(f"{path}: holds no prompt; give at least one")
    _check_distinct(path, prompts)
    standing = _parti_standing(len(prompts)) if reader is _read_parti else UNKNOWN
    return PromptSet(_name(path, md5), prompts, md5, hashlib.sha256(data).hexdigest(), standing)


def _strip(text: str, where: str) -> str:
    return text.strip()


def _warn_of_invisible(path: Path, text: str) -> None:
    if found := INVISIBLE.search(text):
        line = text.count("\n", 0, found.start()) + 1
        log.warning("%s:%d: holds invisible characters, first U+%04X; left out", path, line, ord(found[0]))


def _name(path: Path, md5: str) -> str:
    """A known list's name; else the file's stem, or its whole name where the stem is a known list's."""
    taken = {*KNOWN_LISTS.values(), BENCHTOP, HPS_BENCHMARK}
    return KNOWN_LISTS.get(md5) or (path.name if path.stem in taken else path.stem)


def _read_txt(path: Path, text: str, clean: Clean) -> Iterable[Prompt]:
    for number, line in enumerate(text.split("\n")):
        where = f"{path}:{number + 1}"
        if LINE_ENDS.search(line.strip()) or "\0" in line:  # else a whole file of such line ends is one prompt
            raise UsageError(f"{where}: a line end that is no line feed, or a NUL; end lines with line feeds")
        if prompt := clean(line, where):
            yield Prompt(f"{path.stem}/{number}", prompt)


def _read_jsonl(path: Path, text: str, clean: Clean) -> Iterable[Prompt]:
    for number, row in json_lines(text, path):
        where = f"{path}:{number}"
        unknown = set(row) - {"text", "id", "group", "scene"} if isinstance(row, dict) else {"(not an object)"}
        if unknown:
            raise UsageError(
                f"{where}: expected an object with text, id, group, scene; got {', '.join(sorted(unknown))}"
            )
        prompt = clean(row["text"], where) if isinstance(row.get("text"), str) else ""
        if not prompt:
            raise UsageError(f"{where}: 'text' is missing or empty; every row needs a prompt")
        _check_scene(row.get("scene"), where)
        identity, group = row.get("id", f"{path.stem}/{number - 1}"), row.get("group", "")
        known = clean(str(identity), where) if type(identity) in (str, int) else ""
        if not known or not isinstance(group, str):
            raise UsageError(f"{where}: 'id' must be a text or a whole number, and 'group' a text")
        yield Prompt(known, prompt, clean(group, where), row.get("scene"))


def _check_scene(scene: Any, where: str) -> None:
    """Refuse a scene that does not survive a round trip: it lacks an attribute or holds a wrong one."""
    from rgbench.benchtop.scenes import Scenes

    if scene is None:
        return
    try:
        whole = isinstance(scene, dict) and Scenes.from_dicts([scene]).to_dict(0) == scene
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error
    if not whole:
        raise UsageError(f"{where}: 'scene' is not a whole scene: layout, and shape, colour, size of each object")


def _read_coco(path: Path, text: str, clean: Clean) -> Iterable[Prompt]:
    document = parse_json_text(text, str(path))
    annotations = document.get("annotations") if isinstance(document, dict) else None
    if not isinstance(annotations, list):
        raise UsageError(f"{path}: not COCO captions: expected an object with a list 'annotations'")
    first: dict[int, tuple[int, str]] = {}
    for number, row in enumerate(annotations):
        where = f"{path}: annotation {number}"
        try:
            image, key, caption = row["image_id"], row["id"], clean(row["caption"], where)
            if type(image) is not int or type(key) is not int:
                raise ValueError("ids are whole numbers")
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise UsageError(f"{where} lacks image_id, id or caption ({error!r})") from error
        if caption and (image not in first or key < first[image][0]):
            first[image] = key, caption
    for image, (_, caption) in sorted(first.items()):
        yield Prompt(f"coco/{image}", caption)


def _read_parti(path: Path, text: str, clean: Clean) -> Iterable[Prompt]:
    header, *lines = text.split("\n")
    columns = header.rstrip("\r").split("\t")
    if not {"Prompt", "Category"} <= set(columns):
        raise UsageError(f"{path}:1: not PartiPrompts: expected the columns Prompt and Category, found {columns}")
    check_header(columns, path)
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        where, cells = f"{path}:{number + 2}", line.rstrip("\r").split("\t")
        if any(cells[len(columns) :]):
            raise UsageError(f"{where}: more cells than columns; take tabs out of the texts")
        row = dict(zip(columns, cells, strict=False))
        prompt = clean(row.get("Prompt", ""), where)
        if not prompt:
            raise UsageError(f"{where}: no prompt in this row")
        yield Prompt(f"{path.stem}/{number}", prompt, clean(row.get("Category", ""), where))


def _parti_standing(num: int) -> str:
    """How a list in PartiPrompts' form relates to the published one."""
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
        texts = parse_json_text(decode_text(data, path), str(path))
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise UsageError(f"{path}: expected a list of prompts; fetch it again")
        if len(texts) != HPS_PROMPTS_PER_STYLE:
            raise UsageError(f"{path}: {len(texts)} prompts; the benchmark has {HPS_PROMPTS_PER_STYLE} of each style")
        prompts += [Prompt(f"{style}/{i:05d}", text.strip(), style) for i, text in enumerate(texts)]
    return PromptSet(HPS_BENCHMARK, tuple(prompts), None, digest.hexdigest())


def _check_distinct(path: Path, prompts: tuple[Prompt, ...]) -> None:
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise UsageError(f"{path}: the id {prompt.id!r} occurs twice; images are named by it")
        seen.add(prompt.id)


def repeat_prompts(prompts: PromptSet, times: int) -> PromptSet:
    """Repeat each prompt ``times`` times in a row, for several images of each.

    The k-th copy's id ends in ``#k``. Noise is a function of the id, so each copy starts from its own.

    Raises:
        UsageError: fewer than two times.
    """
    if times < 2:
        raise UsageError(f"repeat prompts at least 2 times, not {times}")
    copies = [replace(prompt, id=f"{prompt.id}#{k}") for prompt in prompts.prompts for k in range(times)]
    return PromptSet(f"{prompts.name} × {times}", tuple(copies))


def without_copy(prompt_id: str) -> str:
    """The id of the prompt that a copy was made of, or an id that is no copy's."""
    return COPY.sub("", prompt_id)


def write_prompts(prompts: PromptSet, path: Path) -> Path:
    """Write a list as .jsonl, with groups and scenes, for ``rgbench eval --prompts``.

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
