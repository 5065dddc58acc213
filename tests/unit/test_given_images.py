"""Folders of images as targets: matched to prompts one to one, or refused with the files named."""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rgbench.benchtop.scenes import scene_batch
from rgbench.core.errors import UsageError
from rgbench.core.io import file_stem
from rgbench.data.prompts import Prompt, PromptSet, benchtop_prompts
from rgbench.evaluate.images import GivenImages, list_images, match_images, png_bytes
from rgbench.evaluate.results import load_results
from rgbench.metrics.reference import ReferenceFolder, to_uint8
from tests.tiny_models import run_eval, stored_values

PROMPTS = PromptSet("mine", tuple(Prompt(f"mine/{i}", text) for i, text in enumerate(["a cat", "a dog", "a fox"])))


def picture(seed: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def filled(folder: Path, names: list[str]) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / name)
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ["mine_0.png", "mine_1.png", "mine_2.png"],
        ["mine_0-0.png", "mine_1-0.png", "mine_2-0.png"],
        ["mine/0.png", "mine/1.png", "mine/2.png"],
        ["00000.png", "00001.png", "00002.png"],
        ["1.png", "2.png", "3.png"],
    ],
)
def test_names_say_the_prompt(tmp_path, names):
    found = match_images(filled(tmp_path, names), PROMPTS, PROMPTS, seed=0)
    assert [str(path.relative_to(tmp_path)) for path in found] == names


def test_numbers_are_numbers_and_not_text(tmp_path):
    many = PromptSet("m", tuple(Prompt(f"m/{i}", str(i)) for i in range(12)))
    filled(tmp_path, [f"{i}.png" for i in range(12)])
    assert [path.name for path in match_images(tmp_path, many, many, 0)] == [f"{i}.png" for i in range(12)]


def test_the_first_prompts_alone_may_be_measured(tmp_path):
    filled(tmp_path, ["0.png", "1.png", "2.png"])
    assert [path.name for path in match_images(tmp_path, PROMPTS.first(2), PROMPTS, 0)] == ["0.png", "1.png"]


def test_a_lost_first_image_does_not_move_all_others_by_one(tmp_path):
    filled(tmp_path, ["1.png", "2.png"])  # of 0, 1, 2
    for num in (1, 3):
        with pytest.raises(UsageError, match="no image has the number 0, and 2 images are not all of 3 counted from 1"):
            match_images(tmp_path, PROMPTS.first(num), PROMPTS, 0)
    found = match_images(tmp_path, PROMPTS.first(2), PROMPTS, 0)
    assert [path.name for path in found] == ["1.png", "2.png"], "as many as are asked for"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["0.png", "2.png"], "1 of 3 prompts have no image: 'mine/1'"),
        (["0.png", "1.png", "2.png", "3.png"], "4 numbered images for 3 prompts: '3' belong to none"),
        (["1.png", "01.png", "2.png"], "two images have one number"),
        (["mine_0.png", "mine_1.png"], "1 of 3 prompts have no image: 'mine/2'"),
        (["mine_0.png", "mine_1.png", "mine_2.png", "old.png"], "1 images belong to no prompt of mine: 'old'"),
        (["mine_0.png", "mine_0-0.png", "mine_1.png"], "both 'mine_0-0', 'mine_0' fit the prompt 'mine/0'"),
        (["0.png", "1.png", "fox.png"], ": 'fox' do not say which prompt they belong to"),
        (["cat.png", "dog.png", "fox.png"], "do not say which prompt they belong to; name the images by the prompts'"),
        (["0.png", "0.jpg", "1.png"], "0.jpg and 0.png would both be image '0'"),
    ],
)
def test_what_does_not_match_is_named(tmp_path, names, message):
    with pytest.raises(UsageError, match=message):
        match_images(filled(tmp_path, names), PROMPTS, PROMPTS, seed=0)


def test_a_link_that_leads_back_gives_no_image_twice(tmp_path):
    names = ["0.png", "sub/1.png", "sub/2.png"]
    filled(tmp_path, names)
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "sub")
    assert len(list_images(tmp_path)) == 3 and len(ReferenceFolder(tmp_path, tmp_path / "cache")) == 3


def test_a_reference_image_that_is_gone_is_named(tmp_path):
    filled(tmp_path, ["0.png", "1.png"])
    (tmp_path / "1.png").unlink()
    (tmp_path / "1.png").symlink_to("nowhere.png")
    with pytest.raises(UsageError, match=r"1\.png: cannot be read: No such file"):
        _ = ReferenceFolder(tmp_path, tmp_path / "cache").content


def test_a_table_names_the_images(tmp_path):
    filled(tmp_path, ["x.png", "y.png", "z.png"])
    rows = [{"file_name": f"{n}.png", "text": t} for n, t in (("y", "a cat"), ("x", "a fox"), ("z", "a dog"))]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [path.name for path in match_images(tmp_path, PROMPTS, PROMPTS, 0)] == ["y.png", "z.png", "x.png"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows[:2])))
    with pytest.raises(UsageError, match="1 of 3 prompts have no image: 'mine/1'"):
        match_images(tmp_path, PROMPTS, PROMPTS, 0)
    with pytest.raises(UsageError, match="1 images belong to no row of the folder's table: 'z'"):
        match_images(tmp_path, PROMPTS.first(1), PROMPTS.first(1), 0)


def test_images_of_other_words_are_refused(tmp_path):
    filled(tmp_path, ["a.png", "b.png", "c.png"])
    rows = [{"file": f"{n}.png", "prompt_id": f"mine/{i}", "prompt": "a cow", "seed": 0} for i, n in enumerate("abc")]
    (tmp_path / "index.json").write_text(json.dumps(rows))
    with pytest.raises(UsageError, match="3 images were made from another text .* 'a' from 'a cow'.*says 'a cat'"):
        match_images(tmp_path, PROMPTS, PROMPTS, 0)
    with pytest.raises(UsageError, match="names no image of seed 1"):
        match_images(tmp_path, PROMPTS, PROMPTS, 1)


def spoil(folder: Path, kind: str) -> None:
    wide = np.zeros((8, 8), dtype=np.uint16)
    if kind == "truncated":
        path = folder / "1.png"
        path.write_bytes(path.read_bytes()[:-40])
    elif kind == "rgba":
        picture(1).convert("RGBA").save(folder / "1.png")
    elif kind == "grey16":
        Image.fromarray(wide).save(folder / "1.png")
    elif kind == "rgb16":
        (folder / "1.png").write_bytes(png16())
    elif kind == "cmyk":
        (folder / "1.png").unlink()
        picture(1).convert("CMYK").save(folder / "1.jpg")
    elif kind == "turned":
        exif = Image.Exif()
        exif[274] = 6
        picture(1).save(folder / "1.png", exif=exif)
    elif kind == "not square":
        for i in range(3):
            picture(i, (8, 6)).save(folder / f"{i}.png")
    elif kind == "other size":
        picture(1, (16, 16)).save(folder / "1.png")


def png16() -> bytes:
    """An RGB PNG of 16 bits per channel, which Pillow itself cannot write."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + b"\x12\x34" * 3 * 8 for _ in range(8))
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "1 of 3 images cannot be measured:\n  .*1.png: not a readable PNG"),
        ("rgba", "1.png: has transparency .RGBA.; save it as an 8-bit RGB image"),
        ("grey16", "1.png: has pixels of mode I;16"),
        ("rgb16", "1.png: has 16 bits per channel"),
        ("cmyk", "1.jpg: has pixels of mode CMYK"),
        ("turned", "1.png: is turned by its EXIF orientation"),
        ("not square", "images of 8×6 pixels; crop them to squares"),
        ("other size", r"images of several sizes: 8×8 .0.png., 16×16 .1.png."),
    ],
)
def test_images_that_would_be_changed_in_silence_are_refused(tmp_path, kind, message):
    filled(tmp_path, ["0.png", "1.png", "2.png"])
    GivenImages(tmp_path, PROMPTS, PROMPTS, 0, 2)
    spoil(tmp_path, kind)
    with pytest.raises(UsageError, match=message):
        GivenImages(tmp_path, PROMPTS, PROMPTS, 0, 2)


def test_the_generation_follows_the_contents_and_not_the_names(tmp_path):
    first = GivenImages(filled(tmp_path / "a", ["0.png", "1.png", "2.png"]), PROMPTS, PROMPTS, 0, 2)
    other = GivenImages(filled(tmp_path / "b", ["mine_0.png", "mine_1.png", "mine_2.png"]), PROMPTS, PROMPTS, 0, 2)
    assert first.generation == other.generation and first.jpeg is None
    picture(9).save(tmp_path / "b" / "mine_1.png")
    assert GivenImages(tmp_path / "b", PROMPTS, PROMPTS, 0, 2).generation.id != first.generation.id
    batches = list(first.stream(np.array([2, 0, 1])))
    assert [len(batch.prompts) for batch in batches] == [2, 1]
    assert np.array_equal(batches[0].images[1].permute(1, 2, 0).numpy(), np.array(picture(0)))
    (tmp_path / "b" / "mine_1.png").unlink()
    lossy = []
    for name in ("mine_1.jpg", "mine_1.png"):  # what a file is called does not matter
        picture(1).save(tmp_path / "b" / name, format="JPEG")
        lossy.append(GivenImages(tmp_path / "b", PROMPTS, PROMPTS, 0, 2))
        (tmp_path / "b" / name).unlink()
    assert {each.jpeg for each in lossy} == {"as given (.jpg)"} and lossy[0].generation == lossy[1].generation


def test_the_format_and_not_the_name_says_whether_images_are_lossy(tmp_path):
    filled(tmp_path / "named", ["0.png", "1.png", "2.png"])
    for path in (tmp_path / "named").iterdir():
        Image.open(path).save(path, format="JPEG")
    (tmp_path / "jpg").mkdir()
    for path in (tmp_path / "named").iterdir():
        shutil.copy(path, tmp_path / "jpg" / f"{path.stem}.jpg")
    png, jpg = (GivenImages(tmp_path / name, PROMPTS, PROMPTS, 0, 2) for name in ("named", "jpg"))
    assert png.jpeg == jpg.jpeg == "as given (.jpg)" and png.generation == jpg.generation


def test_names_are_matched_in_one_unicode_form(tmp_path):
    """macOS hands on decomposed names."""
    name = "caf\u00e9"
    filled(tmp_path, [f"{unicodedata.normalize('NFD', name)}.png", "plain.png"])
    prompts = PromptSet("mine", (Prompt(name, "a cat"), Prompt("plain", "a dog")))
    assert len(match_images(tmp_path, prompts, prompts, 0)) == 2
    rows = [{"file_name": f"{name}.png", "text": "a cat"}, {"file_name": "plain.png", "text": "a dog"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert len(match_images(tmp_path, prompts, prompts, 0)) == 2


@pytest.mark.parametrize("option", [{"steps": 5}, {"dtype": "float16"}, {"guidance": 3.0}, {"sampler": "lcm"}])
def test_what_serves_models_alone_is_refused(tmp_path, option):
    filled(tmp_path / "mine", ["0.png", "1.png", "2.png"])
    (tmp_path / "mine.txt").write_text("a cat\na dog\na fox\n")
    with pytest.raises(UsageError, match=f"--{next(iter(option))}: says how images are made; .*mine holds finished"):
        run_eval([str(tmp_path / "mine")], ["hps"], prompts=str(tmp_path / "mine.txt"), **option)


def save_scenes(folder: Path, num: int) -> None:
    """The benchtop's own scenes under the names that rgbench gives: every attribute is right."""
    folder.mkdir()
    images = to_uint8(scene_batch("all", range(num))[0])
    for prompt, image in zip(benchtop_prompts(num).prompts, images, strict=True):
        (folder / f"{file_stem(prompt.id)}-0.png").write_bytes(png_bytes(image))


def test_saved_images_are_measured_like_their_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_scenes(Path("mine"), 6)
    run_eval(["mine"], ["hps", "kid"], prompts="benchtop", num=6, keep_images=1)
    values = stored_values()
    assert set(values) == {"hps_no_antialias", "hps", "kd_efflite0"} and len(values["hps"].rows.keys) == 6
    (result,) = load_results(Path("results"))
    assert (result.head.world, result.head.model, result.head.method) == ("benchtop", "mine", "external")
    assert result.head.generation.id.startswith("images-") and result.head.generation.fields["sampler"] == "images"
    assert result.head.cost["nfe"] is None and len(result.images) == 1
    with pytest.raises(UsageError, match="nothing says what its images should show.*--prompts benchtop"):
        run_eval(["mine"], ["hps"])


def test_images_that_are_also_the_reference_are_counted(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    save_scenes(Path("mine"), 6)
    shutil.copytree("mine", "real")
    for i in range(4):
        picture(i, (64, 64)).save(f"real/other-{i}.png")
    Path("real/test_0-0.png").unlink()
    run_eval(["mine"], ["kid", "hps"], prompts="benchtop", num=6, reference=Path("real"))
    assert "5 of 6 images are also in --reference" in caplog.text
    values = stored_values()
    assert "5 images are in the reference" in values["kd_efflite0"].flags and values["hps"].flags == ()


def test_images_of_another_size_are_of_another_world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    for i in range(2):
        picture(i, (32, 32)).save(f"mine/{i}.png")
    Path("mine.txt").write_text("a cat\na dog\n")
    (result,) = run_eval(["mine"], ["spectrum"], prompts="mine.txt")
    assert result.head.world == "full-size"
    with pytest.raises(UsageError, match="not a benchtop model"):
        run_eval(["mine", "teacher"], ["spectrum"])
