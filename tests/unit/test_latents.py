"""The latents cache: the same numbers as without it, whole after any interruption, another one for other contents."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from rgbench.core.errors import RgbenchError, UsageError
from rgbench.core.io import read_json, seal, unseal
from rgbench.core.run import RunDirectory
from rgbench.data import latents
from rgbench.data.batches import Batch, Encoded
from rgbench.data.config import TeacherData
from rgbench.data.latents import LatentsCache, TeacherSource
from rgbench.data.sources import open_source
from rgbench.models.pipeline import load_models
from rgbench.train import cache as caching
from rgbench.train.cache import cache, cache_of, encode, open_cached
from rgbench.train.recipe import load_recipe
from rgbench.train.train import train
from tests.parity import tiny


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny.save_pipeline(tmp_path_factory.mktemp("latents") / "teacher")


@pytest.fixture
def recipe(teacher, tmp_path, monkeypatch) -> str:
    """Ten images with a caption that recurs, in a folder; shards of four."""
    from PIL import Image

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    monkeypatch.setattr(latents, "SHARD_SAMPLES", 4)
    monkeypatch.chdir(tmp_path)
    batch = tiny.TinySource().load(list(range(10)))
    (tmp_path / "images").mkdir()
    for number, (image, prompt) in enumerate(zip(batch.images_BCHW, batch.prompts, strict=True)):
        Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / "images" / f"{number}.png")
        (tmp_path / "images" / f"{number}.txt").write_text(prompt)
    values = tiny.recipe(train={"steps": 5, "log_every": 1}).model_dump(mode="json")
    values = {key: values[key] for key in ("name", "seed", "train", "lcd", "sampling")}
    values |= {"kind": "lcd", "model": {"path": str(teacher)}}
    values["data"] = {"kind": "image_folder", "path": str(tmp_path / "images"), "resolution": 16}
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(values))
    return str(file)


def opened(recipe: str, *overrides: str, wanted: str = "always"):
    settings = load_recipe(recipe, list(overrides))
    return open_cached(settings, open_source(settings.data), settings.model.teacher_folder(), wanted)


def test_rows_are_what_the_encoders_make(recipe, teacher):
    folder = cache(recipe, [], device="cpu")
    names = ["000000000.safetensors", "000000004.safetensors", "000000008.safetensors"]
    assert sorted(os.listdir(folder)) == [*names, "cache.json"]
    models, cached = load_models(teacher, "cpu", torch.float32), opened(recipe)
    settings = load_recipe(recipe)
    source = open_source(settings.data)
    order = [7, 0, 9, 3, 6, 7]
    plain, found = source.load(order), cached.load(order)
    assert (found.prompts, found.ids, found.images_BCHW) == (plain.prompts, plain.ids, None)
    wanted, got = encode(models, plain), encode(models, found)
    for part in ("mean", "std", "prompt_embeds"):
        assert torch.allclose(getattr(got, part), getattr(wanted, part), rtol=1e-5, atol=1e-6), part
    assert cached.fingerprint() == source.fingerprint() and cached.length == 10
    texts = latents.open_safetensors(folder / names[0])["prompt_embeds"][:]
    assert len(texts) == 4 and len(latents.open_safetensors(folder / names[1])["prompt_embeds"][:]) == 4


def test_training_gives_the_same_numbers_and_says_that_it_used_it(recipe, monkeypatch):
    plain = RunDirectory.open(train(recipe, [], out=Path("plain"), device="cpu"))
    cache(recipe, [], device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(caching.DiffusionModels, "encode_images", None)  # the VAE's encoder must not be needed
        cached = RunDirectory.open(train(recipe, [], out=Path("cached"), device="cpu"))
    assert (plain.read()["latents_cache"], cached.read()["latents_cache"]) == (False, True)
    assert plain.read()["data"] == cached.read()["data"]
    for row, wanted in zip(cached.read_log(), plain.read_log(), strict=True):
        assert row["loss/lcd"] == pytest.approx(wanted["loss/lcd"], rel=1e-3)  # 1.1e-4 without AVX2
    never = RunDirectory.open(train(recipe, ["train.latents_cache=never"], out=Path("never"), device="cpu"))
    assert never.read()["latents_cache"] is False
    assert [row["loss/lcd"] for row in never.read_log()] == [row["loss/lcd"] for row in plain.read_log()]


def test_a_run_that_began_without_goes_on_without(recipe):
    path = train(recipe, ["train.save_every=2"], out=Path("run"), device="cpu")
    straight = [row["loss/lcd"] for row in RunDirectory.open(path).read_log()]
    run = RunDirectory.open(path)
    for step in (5,):
        for file in (run.checkpoints / f"step-{step:08d}").iterdir():
            file.unlink()
        (run.checkpoints / f"step-{step:08d}").rmdir()
    run.update(status="interrupted", step=4)
    cache(recipe, [], device="cpu")
    train(recipe, ["train.save_every=2"], out=Path("run"), device="cpu")
    assert [row["loss/lcd"] for row in run.read_log()] == straight


def test_an_interrupted_cache_goes_on(recipe, monkeypatch):
    real, written = latents.LatentsCache.write_shard, []

    def write(self, path, batches):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        real(self, path, batches)

    with monkeypatch.context() as patch:
        patch.setattr(latents.LatentsCache, "write_shard", write)
        with pytest.raises(KeyboardInterrupt):
            cache(recipe, [], device="cpu")
    with pytest.raises(UsageError, match="no complete latents cache; make it with: rgbench cache"):
        opened(recipe)
    assert opened(recipe, wanted="auto").load([0]).encoded is None
    before = {path: path.stat().st_mtime_ns for path in written}
    said: list[str] = []
    cache(recipe, [], device="cpu", say=said.append)
    assert len(said) == 1 and {path: path.stat().st_mtime_ns for path in written} == before
    assert opened(recipe).load([9]).encoded is not None


def test_other_contents_are_another_cache(recipe, tmp_path, teacher):
    settings = load_recipe(recipe)
    source, folder = open_source(settings.data), settings.model.teacher_folder()
    first = cache_of(settings, source, folder).folder
    assert cache_of(load_recipe(recipe, ["seed=3", "train.lr=0.1"]), source, folder).folder == first
    assert cache_of(load_recipe(recipe, ["train.dtype=bfloat16"]), source, folder).folder != first
    (tmp_path / "images" / "3.txt").write_text("another caption")
    assert cache_of(settings, open_source(settings.data), folder).folder != first
    torch.manual_seed(3)
    other = tiny.save_pipeline(tmp_path / "other")
    file = other / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert cache_of(settings, source, other).folder != first
    elsewhere = load_recipe(recipe, [f"train.latents_cache_root={tmp_path / 'big'}"])
    assert cache_of(elsewhere, source, folder).folder == tmp_path / "big" / first.name


def test_a_damaged_row_is_found(recipe):
    folder = cache(recipe, [], device="cpu")
    file = folder / "000000004.safetensors"
    data = bytearray(file.read_bytes())
    data[-4 * 4 * 8 * 8] ^= 1  # among the float32 rows, which the file holds after its int64 ones
    file.write_bytes(data)
    source = opened(recipe)
    with pytest.raises(UsageError, match=r"000000004\.safetensors: damaged in row \d; .*rgbench cache"):
        source.load([4, 5, 6, 7])
    assert source.load([0, 1, 8]).encoded is not None
    file.unlink()
    with pytest.raises(UsageError, match=r"000000004\.safetensors"):
        opened(recipe).load([4])


def test_one_flipped_bit_is_never_used_in_silence(recipe):
    folder = cache(recipe, [], device="cpu")
    file = folder / "000000004.safetensors"
    whole, order = file.read_bytes(), [4, 5, 6, 7]
    good = opened(recipe).load(order)
    for bit in random.Random(0).choices(range(8 * len(whole)), k=150):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        try:
            found = opened(recipe).load(order)
        except UsageError as error:
            assert file.name in str(error)
            continue
        assert (found.prompts, found.ids) == (good.prompts, good.ids), bit
        for part in ("mean", "std", "prompt_embeds"):
            assert torch.equal(getattr(found.encoded, part), getattr(good.encoded, part)), bit


def test_data_without_end_is_refused(recipe):
    with pytest.raises(UsageError, match=r"data\.num: endless data"):
        cache(recipe, ["data={kind: scenes}"], device="cpu")


def test_bfloat16_is_kept_as_it_was_computed(recipe):
    words = ["train.dtype=bfloat16"]
    cache(recipe, words, device="cpu")
    encoded = opened(recipe, *words).load([2]).encoded
    assert encoded.mean.dtype == torch.bfloat16
    run = RunDirectory.open(train(recipe, words, device="cpu"))
    assert run.read()["latents_cache"] is True and run.read()["status"] == "finished"


# A teacher's samples, whose folder is named by the user


def samples_of(folder: Path, teacher: str = "a", num: int = 4, samples: int = 2, **encoded: float) -> Path:
    """A complete cache of ``num`` latents, ``samples`` of each prompt."""
    found = LatentsCache(folder, {"kind": "teacher", "teacher": {"sha256": teacher}, "samples": samples}, num)
    drawn = torch.randn(num, 4, 2, 2, generator=torch.Generator().manual_seed(ord(teacher)))
    values = {"mean": drawn, "std": torch.zeros_like(drawn), "prompt_embeds": torch.ones(num, 3, 5)}
    values |= {name: torch.full_like(values[name], value) for name, value in encoded.items()}
    prompts = [f"{teacher}{i // samples}" for i in range(num)]
    batch = Batch(None, prompts, [f"{teacher}#{i}" for i in range(num)], Encoded(**values), torch.arange(num).double())
    found.write_shard(found.shard(0)[0], [batch])
    found.complete()
    return folder


def read_samples(folder: Path) -> tuple[list[str], list[list[float]]]:
    source = TeacherSource(TeacherData(kind="teacher", path=str(folder)))
    batch = source.load(list(range(source.length or 0)))
    return batch.prompts, batch.scores.tolist()


def test_a_shard_belongs_to_one_cache(tmp_path):
    """Under the same name in another folder it would give other latents for other prompts."""
    own, wanted = samples_of(tmp_path / "own"), (["a0", "a0", "a1", "a1"], [[0, 1], [0, 1], [2, 3], [2, 3]])
    assert read_samples(own) == wanted
    assert read_samples(Path(shutil.copytree(own, tmp_path / "moved"))) == wanted
    others = {"b": 4, "a": 2}
    for teacher, num in others.items():
        other = samples_of(tmp_path / f"{teacher}{num}", teacher, num)
        shutil.copy(other / "000000000.safetensors", tmp_path / "moved")
        with pytest.raises(UsageError, match=r"000000000\.safetensors: a shard of another cache; remove"):
            read_samples(tmp_path / "moved")


def test_a_shard_of_an_older_version_has_as_many_rows_as_it_should(tmp_path):
    own, few = samples_of(tmp_path / "own"), samples_of(tmp_path / "few", num=2)
    for folder in (own, few):  # they did not say whose they are
        file = folder / "000000000.safetensors"
        save_file(load_file(file), file)
    assert read_samples(own)[0] == ["a0", "a0", "a1", "a1"]
    shutil.copy(few / "000000000.safetensors", own)
    with pytest.raises(UsageError, match=r"damaged: holds 2 samples, not 4; remove"):
        read_samples(own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num": None}, "num None is no number"),
        ({"num": "4"}, "num '4' is no number"),
        ({"num": 0}, "num 0 is no number"),
        ({"num": 6}, "a shard of another cache"),
        ({"num": 2}, "a shard of another cache"),
        ({"num": 3}, "does not say whose samples these are, or how many"),
        ({"schema_version": 1}, "of another version of rgbench"),
        ({"shard_samples": 128}, "of another version of rgbench"),
        ({"identity": {"kind": "teacher", "teacher": {"sha256": "a"}, "samples": 4}}, "a shard of another cache"),
        ({"identity": {"kind": "teacher", "teacher": {"sha256": "a"}, "samples": 0}}, "or how many"),
        ({"identity": {"kind": "teacher", "teacher": {"sha256": "a"}}}, "or how many"),
        ({"identity": {"kind": "teacher", "samples": 2}}, "does not say whose samples"),
    ],
)
def test_an_index_that_tells_of_other_samples_is_refused(tmp_path, change, message):
    folder = samples_of(tmp_path / "own")
    index = {k: v for k, v in (unseal(read_json(folder / "cache.json"), "", "") | change).items() if v is not None}
    (folder / "cache.json").write_text(json.dumps(seal(index)))
    with pytest.raises(UsageError, match=message):
        read_samples(folder)


@pytest.mark.parametrize(("what", "name"), [("mean", "latents"), ("std", "latents"), ("prompt_embeds", "text states")])
def test_what_overflowed_is_not_kept(tmp_path, what, name):
    with pytest.raises(RgbenchError, match=f"the {name} of 'a0' are not finite; use another train.dtype"):
        samples_of(tmp_path / "own", **{what: math.inf})
    assert list((tmp_path / "own").glob("*")) == []
