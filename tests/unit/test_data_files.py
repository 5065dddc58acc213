"""Files that users bring: one walker, one reader of text, one of tables, for training and evaluation alike."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rgbench.core.errors import UsageError
from rgbench.data.config import ImageFolderData
from rgbench.data.files import NamedFiles, clean_text, decode_text, image_files, read_captions
from rgbench.data.prompts import load_prompts
from rgbench.data.sources import open_source
from rgbench.evaluate.images import list_images, match_images, own_prompts
from rgbench.metrics.reference import ReferenceFolder

NFC, NFD = (unicodedata.normalize(form, "café 모델") for form in ("NFC", "NFD"))


def save(path: Path, level: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (level, 0, 0)).save(path)
    return path


def training(folder: Path, captions: str = "txt") -> list[str]:
    """The ids of all samples that training reads in a folder."""
    keys = {"kind": "image_folder", "path": str(folder), "resolution": 16, "captions": captions}
    source = open_source(ImageFolderData.model_validate(keys))
    return source.load(list(range(source.length or 0))).ids


def folder_with_copies(root: Path) -> Path:
    """Three images, and copies of them wherever tools leave such."""
    folder = root / "data"
    for name in ("a.png", "sub/b.JPEG", "sub/c.webp"):
        save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"caption of {name}")
    for place in (".ipynb_checkpoints", "sub/.thumbnails", "__MACOSX/sub", "sub/@eaDir/b.JPEG", ".git/x"):
        save(folder / place / "a-checkpoint.png")
        (folder / place / "a-checkpoint.txt").write_text("a copy")
    (folder / "._a.png").write_bytes(b"resource fork")
    return folder


def test_every_reader_finds_the_same_images(tmp_path: Path) -> None:
    folder = folder_with_copies(tmp_path)
    expected = ["a.png", "sub/b.JPEG", "sub/c.webp"]
    assert [path.relative_to(folder).as_posix() for path in image_files(folder)] == expected
    assert training(folder) == expected
    assert len(ReferenceFolder(folder, tmp_path / "cache")) == 3
    assert list(list_images(folder)) == ["a", "sub/b", "sub/c"]


def test_links_are_followed_once(tmp_path: Path) -> None:
    """Wherever they lead: up, to one another, out of the folder, or to a folder that is there already."""
    folder = folder_with_copies(tmp_path)
    save(tmp_path / "elsewhere" / "d.png")
    (tmp_path / "elsewhere" / "d.txt").write_text("d")
    for name, target in (
        ("loop", folder),
        ("sub/up", ".."),
        ("aaa", "sub"),
        ("zzz", tmp_path / "elsewhere"),
        ("again", tmp_path / "elsewhere"),
    ):
        (folder / name).symlink_to(target, target_is_directory=True)
    (tmp_path / "elsewhere" / "back").symlink_to(folder, target_is_directory=True)
    found = [path.relative_to(folder).as_posix() for path in image_files(folder)]
    assert found == ["a.png", "again/d.png", "sub/b.JPEG", "sub/c.webp"]
    assert training(folder) == found and len(ReferenceFolder(folder, tmp_path / "cache")) == 4


def test_a_hidden_folder_can_be_named(tmp_path: Path) -> None:
    save(tmp_path / ".data" / "a.png")
    assert [path.name for path in image_files(tmp_path / ".data")] == ["a.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    save(tmp_path / "sub" / "a.png").parent.chmod(0)
    try:
        with pytest.raises(UsageError, match="sub: cannot be read"):
            image_files(tmp_path)
    finally:
        (tmp_path / "sub").chmod(0o755)


@pytest.mark.parametrize(("on_disk", "in_table"), [(NFD, NFC), (NFC, NFD), (NFC, NFC)])
def test_names_are_the_same_in_either_unicode_form(tmp_path: Path, on_disk: str, in_table: str) -> None:
    folder = tmp_path / "data"
    save(folder / on_disk / f"{on_disk}.png")
    save(folder / "plain.png")
    (folder / on_disk / f"{in_table}.txt").write_text("beside")
    (folder / "plain.txt").write_text("beside")
    names = (f"{in_table}/{in_table}.png", "plain.png")
    rows = [json.dumps({"file_name": name, "text": "in the table"}, ensure_ascii=False) for name in names]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    assert training(folder) == [f"{on_disk}/{on_disk}.png", "plain.png"]
    assert training(folder, "metadata.jsonl") == [f"{on_disk}/{on_disk}.png", "plain.png"]
    prompts = own_prompts(folder, 0)
    assert match_images(folder, prompts, prompts, 0) == [folder / on_disk / f"{on_disk}.png", folder / "plain.png"]
    prompt_file = tmp_path / "p.jsonl"
    ids = [name.removesuffix(".png") for name in names]
    prompt_file.write_text("\n".join(json.dumps({"id": identity, "text": "x"}) for identity in ids))
    (folder / "metadata.jsonl").unlink()
    prompts = load_prompts(prompt_file)
    assert match_images(folder, prompts, prompts, 0) == [folder / on_disk / f"{on_disk}.png", folder / "plain.png"]


def test_two_names_of_one_form_are_refused(tmp_path: Path) -> None:
    for name in (NFC, NFD):
        save(tmp_path / f"{name}.png")
    with pytest.raises(UsageError, match="would both be image"):
        list_images(tmp_path)
    assert NamedFiles(tmp_path).find(f"{NFD}.png") == tmp_path / f"{NFD}.png", "the exact name goes first"


INVISIBLE = {
    "byte order mark": "\ufeffa red circle",
    "in the middle": "a\u200b red\ufeff circle",
    "soft hyphen": "a red cir\u00adcle",
    "directions": "a \u202ered\u202c circle",
    "tags": "a red circle\U000e0041\U000e0042",
    "control": "a red\x1b circle",
    "idle joiner": "a red\u200d circle",
    "joiner of graphemes": "a red\u034f circle",
    "selectors": "a red\U000e0100 circle",
    "spaces": "\u3000 a red circle \u00a0",
}


@pytest.mark.parametrize("text", INVISIBLE.values(), ids=INVISIBLE)
def test_what_nobody_sees_is_left_out_by_every_reader(tmp_path: Path, text: str) -> None:
    rows = {"a.jsonl": json.dumps({"text": text}), "a.txt": text, "a.tsv": f"Prompt\tCategory\n{text}\tx"}
    rows["a.json"] = json.dumps({"annotations": [{"image_id": 1, "id": 1, "caption": text}]})
    for name, content in rows.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert [prompt.text for prompt in load_prompts(tmp_path / name).prompts] == ["a red circle"], name
    folder = tmp_path / "images"
    save(folder / "a.png")
    (folder / "a.txt").write_text(text, encoding="utf-8")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": text}))
    (folder / "captions.csv").write_text(f"file_name,text\na.png,{text}\n", encoding="utf-8")
    for captions in ("txt", "metadata.jsonl", "captions.csv"):
        keys = {"kind": "image_folder", "path": str(folder), "resolution": 16, "captions": captions}
        source = open_source(ImageFolderData.model_validate(keys))
        assert source.load([0]).prompts == ["a red circle"], captions
    assert [prompt.text for prompt in own_prompts(folder, 0).prompts] == ["a red circle"]


@pytest.mark.parametrize(
    "text",
    ["👩‍🚀 and 👨‍👩‍👧 on the moon ❤️", "می‌خواهم", "क्‍ष", "a café", "a  red\ncircle", "模型", "a\tb", "𝔸"],
)
def test_texts_of_all_scripts_stay_as_they_are(text: str) -> None:
    assert clean_text(text, "here") == text


@pytest.mark.parametrize("text", ["", " ", "\u200b", "\u2800", "\u3164\u200d", "\ufeff\n\u00ad", "\x07"])
def test_nothing_to_be_seen_is_nothing(tmp_path: Path, text: str) -> None:
    assert clean_text(text, "here") == ""
    (tmp_path / "p.txt").write_text(f"one\n{text}\ntwo\n", encoding="utf-8")
    assert [prompt.text for prompt in load_prompts(tmp_path / "p.txt").prompts] == ["one", "two"]
    (tmp_path / "p.jsonl").write_text(json.dumps({"text": text}))
    with pytest.raises(UsageError, match=r"p\.jsonl:1: 'text' is missing or empty"):
        load_prompts(tmp_path / "p.jsonl")


@pytest.mark.parametrize("text", ["a\0b", "a\ud800b"])
def test_damaged_texts_are_refused_with_their_place(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.jsonl").write_text("\n" + json.dumps({"text": text}))
    with pytest.raises(UsageError, match=r"p\.jsonl:2: the text holds U\+(0000|D800)"):
        load_prompts(tmp_path / "p.jsonl")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": text}))
    with pytest.raises(UsageError, match=r"metadata\.jsonl:1: the text holds U\+"):
        read_captions(tmp_path / "metadata.jsonl")


def test_invisible_characters_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "p.txt").write_text("\ufeffa red circle\n\ufeffa blue star\n")
    load_prompts(tmp_path / "p.txt")
    assert "p.txt:2: holds invisible characters, first U+FEFF" in caplog.text


def test_lists_that_papers_share_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = "a red\u200b circle\n".encode()
    (tmp_path / "p.txt").write_bytes(content)
    known = load_prompts(tmp_path / "p.txt").file_md5
    monkeypatch.setitem(load_prompts.__globals__["KNOWN_LISTS"], known, "a list")
    assert load_prompts(tmp_path / "p.txt").prompts[0].text == "a red\u200b circle"


@given(st.text(max_size=30))
def test_cleaning_again_changes_nothing(text: str) -> None:
    try:
        once = clean_text(text, "here")
    except UsageError as error:
        assert "here: the text holds U+" in str(error)
    else:
        assert clean_text(once, "here") == once and once == once.strip()


def test_text_that_is_not_utf_8_is_named_with_its_line() -> None:
    assert decode_text(b"\xef\xbb\xbfa", "x") == "a"
    for data in ("é".encode("latin-1"), "a\n".encode("utf-16")):
        with pytest.raises(UsageError, match=r"x:1: not UTF-8 at byte 0"):
            decode_text(data, "x")


def test_the_contents_of_an_image_decide_what_it_is(tmp_path: Path) -> None:
    """A PNG called .jpg is read as what it is; what is no image is refused by name."""
    save(tmp_path / "0.png").rename(tmp_path / "0.jpg")
    assert [header.format for header in ReferenceFolder(tmp_path, tmp_path / "cache").headers] == ["PNG"]
    (tmp_path / "0.txt").write_text("x")
    assert training(tmp_path) == ["0.jpg"]
    (tmp_path / "1.png").write_text("no image")
    with pytest.raises(UsageError, match=r"1\.png"):
        _ = ReferenceFolder(tmp_path, tmp_path / "cache").headers


def test_training_turns_images_as_their_files_say(tmp_path: Path) -> None:
    upright = Image.new("RGB", (16, 16), "white")
    upright.paste("red", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[274] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.jpg", exif=exif, quality=95, subsampling=0)
    (tmp_path / "a.txt").write_text("red above white")
    keys = {"kind": "image_folder", "path": str(tmp_path), "resolution": 16}
    image = open_source(ImageFolderData.model_validate(keys)).load([0]).images_BCHW[0]  # type: ignore[index]
    assert image[1, :6].max() < 0.1 and image[1, 10:].min() > 0.9
    assert ReferenceFolder(tmp_path, tmp_path / "cache").headers[0].inexact == "is turned by its EXIF orientation"
