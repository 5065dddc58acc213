"""Prompt sets: the benchtop's, files of each kind, hashes, and clear refusals."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rgbench.benchtop.scenes import Scenes, captions, sample_scenes
from rgbench.core.errors import UsageError
from rgbench.data import prompts as module
from rgbench.data.prompts import HPS_STYLES, KNOWN_LISTS, Prompt, PromptSet, benchtop_prompts, load_prompts

GOLDEN_SHA256 = "e7796d94d225c9ea48127074a7c4b40ea37a5d20f390cd783d0ef90b33ff5ce3"


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_every_fourth_benchtop_prompt_is_held_out() -> None:
    prompts = benchtop_prompts(64).prompts
    assert [p.group for p in prompts] == ["test", "test", "test", "heldout"] * 16
    assert [p.id for p in prompts[:5]] == ["test/0", "test/1", "test/2", "heldout/3", "test/4"]
    for p in prompts:
        scenes = Scenes.from_dicts([p.scene or {}])
        assert bool(scenes.heldout()) == (p.group == "heldout")
        split, index = p.id.split("/")
        assert p.scene == sample_scenes(split, [int(index)]).to_dict(0)
        assert p.text == captions(scenes, split, [int(index)])[0]


def test_a_small_benchtop_set_is_the_beginning_of_a_large_one() -> None:
    assert benchtop_prompts(10).prompts == benchtop_prompts(50).first(10).prompts
    assert benchtop_prompts(10).sha256 == benchtop_prompts(50).first(10).sha256
    assert len(benchtop_prompts()) == 2048
    assert len(benchtop_prompts(1)) == 1


def test_benchtop_prompts_never_change() -> None:
    """Results made with them stay comparable."""
    assert benchtop_prompts(2048).sha256 == GOLDEN_SHA256


def test_the_hash_covers_ids_texts_and_order() -> None:
    def digest(*rows: tuple[str, str]) -> str:
        return PromptSet("x", tuple(Prompt(i, t) for i, t in rows)).sha256

    base = digest(("a", "1"), ("b", "2"))
    assert digest(("a", "1"), ("b", "2")) == base
    others = [digest(("b", "2"), ("a", "1")), digest(("a", "1"), ("c", "2")), digest(("a", "1"), ("b", "3"))]
    assert base not in others and digest(("a", "1b"), ("", "2")) != base


def test_text_file(tmp_path: Path) -> None:
    prompts = load_prompts(written(tmp_path / "mine.txt", "\ufeffa red ball\r\n\n  a blue ring \n"))
    assert [p.text for p in prompts.prompts] == ["a red ball", "a blue ring"]
    assert [p.id for p in prompts.prompts] == ["mine/0", "mine/2"]
    assert prompts.name == "mine" and len(prompts) == 2


def test_jsonl_file(tmp_path: Path) -> None:
    scene = benchtop_prompts(1).prompts[0].scene
    rows = [{"text": "one"}, {"text": " two ", "id": 7, "group": "photo"}, {"text": "three", "scene": scene}]
    path = written(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)))
    assert load_prompts(path).prompts == (
        Prompt("p/0", "one"),
        Prompt("7", "two", "photo"),
        Prompt("p/2", "three", "", scene),
    )


def test_benchtop_prompts_round_trip_through_jsonl(tmp_path: Path) -> None:
    original = benchtop_prompts(12)
    rows = [json.dumps({"id": p.id, "text": p.text, "group": p.group, "scene": p.scene}) for p in original.prompts]
    again = load_prompts(written(tmp_path / "b.jsonl", "\n".join(rows)))
    assert again.prompts == original.prompts and again.sha256 == original.sha256


def test_coco_captions_take_the_first_of_each_image(tmp_path: Path) -> None:
    rows = [
        {"image_id": 9, "id": 50, "caption": "second of nine"},
        {"image_id": 4, "id": 30, "caption": " four "},
        {"image_id": 9, "id": 20, "caption": "first of nine\n"},
    ]
    path = written(tmp_path / "captions_val2014.json", json.dumps({"images": [], "annotations": rows}))
    loaded = load_prompts(path)
    assert loaded.prompts == (Prompt("coco/4", "four"), Prompt("coco/9", "first of nine"))
    assert loaded.name == "captions_val2014"


def test_parti_prompts(tmp_path: Path) -> None:
    rows = 'Prompt\tCategory\tChallenge\tNote\na cat\tAnimals\tBasic\t\n"quoted" dog\tAnimals\tBasic\tx\r\n'
    loaded = load_prompts(written(tmp_path / "PartiPrompts.tsv", rows))
    assert [(p.text, p.group) for p in loaded.prompts] == [("a cat", "Animals"), ('"quoted" dog', "Animals")]
    assert "PartiPrompts: 2 prompts, not PartiPrompts as published: 2 prompts, not 1,632, file md5" in loaded.describe()
    assert "PartiPrompts: 1 prompts, not PartiPrompts as published: 2 prompts" in loaded.first(1).describe()
    header, *_ = rows.split("\n")
    whole = written(tmp_path / "parti.tsv", "\n".join([header, *(f"prompt {i}\tAnimals\t\t" for i in range(1632)), ""]))
    assert "parti: 1632 prompts, as many as PartiPrompts' 1,632, file md5" in load_prompts(whole).describe()
    assert "parti: 8 prompts, as many as PartiPrompts' 1,632" in load_prompts(whole).first(8).describe()


def test_the_hps_benchmark_is_a_folder_of_four_lists(tmp_path: Path) -> None:
    for style in HPS_STYLES:
        written(tmp_path / f"{style}.json", json.dumps([f"{style} {i}" for i in range(800)]))
    loaded = load_prompts(tmp_path)
    assert len(loaded) == 3200 and loaded.name == "hpsv2-benchmark"
    assert loaded.prompts[800] == Prompt("concept-art/00000", "concept-art 0", "concept-art")
    assert [p.group for p in loaded.prompts[::800]] == list(HPS_STYLES)
    assert str(loaded.file_sha256) in loaded.describe()
    written(tmp_path / "photo.json", json.dumps(["one"] * 799))
    with pytest.raises(UsageError, match=r"photo.json: 799 prompts; the benchmark has 800 of each style"):
        load_prompts(tmp_path)
    for content, message in ((b"{}", "expected a list"), (b'["a", " "]', "expected a list"), (b"\xff", "not UTF-8")):
        written(tmp_path / "anime.json", content)
        with pytest.raises(UsageError, match=f"anime.json.*: {message}"):
            load_prompts(tmp_path)
    (tmp_path / "anime.json").unlink()
    with pytest.raises(UsageError, match="anime.json: missing; HPSv2's benchmark has anime.json, concept-art.json"):
        load_prompts(tmp_path)


def test_files_are_known_by_their_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"a cat\na dog\n"
    md5 = hashlib.md5(content).hexdigest()
    path = written(tmp_path / "captions.txt", content)
    unknown = load_prompts(path)
    assert unknown.file_md5 == md5 and unknown.file_sha256 == hashlib.sha256(content).hexdigest()
    assert md5 in unknown.describe() and str(unknown.file_sha256) in unknown.describe()
    assert "captions: 2 prompts, not a list that rgbench knows" in unknown.describe()
    monkeypatch.setitem(module.KNOWN_LISTS, md5, "pets-2")
    assert "pets-2: 2 prompts, a published list" in load_prompts(path).describe()
    assert "benchtop: 4 prompts, sha256" in benchtop_prompts(4).describe()


def test_the_coco_list_of_the_papers_is_known() -> None:
    assert KNOWN_LISTS["20ed79e6a73d7b8fdbfb6ebc8c5c7e99"] == "coco14-30k"


@pytest.mark.parametrize("name", ["coco14-30k", "benchtop", "hpsv2-benchmark"])
def test_a_file_does_not_become_a_published_list_by_its_name(tmp_path: Path, name: str) -> None:
    loaded = load_prompts(written(tmp_path / f"{name}.txt", "a cat\n"))
    assert loaded.name == f"{name}.txt" and loaded.published is None
    assert f"{name}.txt: 1 prompts, not a list that rgbench knows" in loaded.describe()


@pytest.mark.parametrize("num", [0, -1, 5])
def test_first_refuses_more_than_there_is(num: int) -> None:
    with pytest.raises(UsageError, match=rf"cannot take {num} of 4 prompts"):
        benchtop_prompts(4).first(num)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"", "holds no prompt"),
        ("a.txt", b" \n\t\n", "holds no prompt"),
        ("a.txt", b"a cat\ra dog\r", r"a\.txt:1: a line end that is no line feed, or a NUL"),
        ("a.txt", b"a cat\na\0dog\n", r"a\.txt:2: a line end that is no line feed, or a NUL"),
        ("a.txt", b"good\nb\xe4d\n", r"a\.txt:2: not UTF-8 at byte 6"),
        ("a.csv", b"x", r"read from \.txt, \.jsonl, COCO captions \.json, PartiPrompts \.tsv .*, not '\.csv'"),
        ("a.tsv", b"a\tb\nx\ty", r"a\.tsv:1: not PartiPrompts"),
        ("a.tsv", b"Prompt\tCategory\n\tpeople", r"a\.tsv:2: no prompt in this row"),
        ("a.tsv", b"Category\tPrompt\npeople\n", r"a\.tsv:2: no prompt in this row"),
        ("a.jsonl", b'{"text": "x"}\n{"text"', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", b'["x"]', r"a\.jsonl:1: expected an object"),
        ("a.jsonl", b'{"text": "x", "prompt": "y"}', r"a\.jsonl:1: .*got prompt"),
        ("a.jsonl", b'{"id": "x"}', r"a\.jsonl:1: 'text' is missing"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl:1: 'text' is missing"),
        ("a.jsonl", b'{"text": "x", "id": "1"}\n{"text": "y", "id": 1}', "the id '1' occurs twice"),
        ("a.jsonl", b'{"text": "x", "text": "y"}', r"a\.jsonl:1: not valid JSON: key 'text' occurs twice"),
        ("a.jsonl", b'{"text": "x", "id": null}', r"a\.jsonl:1: 'id' must be a text or a whole number"),
        ("a.jsonl", b'{"text": "x", "id": true}', r"a\.jsonl:1: 'id' must be"),
        ("a.jsonl", b'{"text": "x", "group": null}', r"a\.jsonl:1: .*'group' a text"),
        ("a.jsonl", b'{"text": "x", "scene": []}', r"a\.jsonl:1: .*scene"),
        ("a.jsonl", b'{"text": "x", "scene": {"layout": "moon"}}', r"a\.jsonl:1: .*scene"),
        ("a.jsonl", b'{"text": "x", "scene": {"layout": "centre"}}', r"a\.jsonl:1: .*scene"),
        ("a.json", b"[]", "not COCO captions"),
        ("a.json", b'{"annotations": {}}', "not COCO captions"),
        ("a.json", b'{"annotations": []}', "holds no prompt"),
        ("a.json", b'{"annotations": [{"id": 1}]}', "annotation 0 lacks"),
        ("a.json", b'{"annotations": [3]}', "annotation 0 lacks"),
        ("a.json", b'{"annotations": [{"id": 1, "image_id": 1, "caption": null}]}', "annotation 0 lacks"),
        ("a.json", b"[" * 100_000, "not valid JSON"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_prompts(written(tmp_path / name, content))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    for name, message in (("absent.txt", "cannot read the prompt file"), ("folder.txt", "anime.json: missing")):
        with pytest.raises(UsageError, match=message):
            load_prompts(tmp_path / name)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(suffix=st.sampled_from([".txt", ".jsonl", ".json"]), content=st.binary(max_size=80))
def test_any_bytes_give_prompts_or_a_usage_error(tmp_path: Path, suffix: str, content: bytes) -> None:
    try:
        loaded = load_prompts(written(tmp_path / f"f{suffix}", content))
    except UsageError as error:
        assert f"f{suffix}" in str(error)
    else:
        assert len(loaded) >= 1 and all(p.text for p in loaded.prompts)
