"""One flipped bit in anything that rgbench stores: the same values come back, or the file is refused or made again."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rgbench.arena.contest import read_design
from rgbench.arena.votes import Vote, Votes
from rgbench.core.checkpoint import commit, latest, load
from rgbench.core.errors import RgbenchError
from rgbench.core.io import check_sums, write_sums
from rgbench.data.batches import Batch, Encoded
from rgbench.data.latents import CachedSource, LatentsCache, TeacherSource
from rgbench.data.tars import index_shard
from rgbench.evaluate.config import Shard
from rgbench.evaluate.images import ImageBatch
from rgbench.evaluate.results import SheetImage, load_result, write_sheet
from rgbench.evaluate.shards import Pass, stored_shards
from rgbench.judge.headroom import Group, Headroom, picks, read_headroom, write_headroom
from rgbench.judge.verdict import Declared, give_verdicts, load_verdicts
from rgbench.metrics.cache import keep_array
from rgbench.metrics.features import FeatureRows, FeatureSet
from rgbench.metrics.reference import ReferenceFolder
from rgbench.models.folder import check_folder, weights_sha256
from rgbench.models.presets import WEIGHTS
from rgbench.rewards.latent_proxy import LatentCLIP
from tests.arena_maker import make_models, opened
from tests.results_maker import RUN, make_result
from tests.tiny_models import save_pipeline

SHORT, LONG = 400, 4000
WHOLE = Shard(index=1, count=2)


@dataclass(frozen=True)
class Kind:
    """One kind of stored thing.

    Attributes:
        make: stores one below a folder, and gives the files that may be damaged.
        read: what is used of it, as text or as comparable values.
    """

    make: Callable[[Path], list[Path]]
    read: Callable[[Path], Any]


def below(folder: Path, *names: str) -> list[Path]:
    found = [path for path in folder.rglob("*") if path.is_file() and (not names or path.name in names)]
    return sorted(path for path in found if path.name not in (".gitignore", "README.md"))


# Results


def make_results(folder: Path) -> list[Path]:
    rows = {"hps": np.linspace(20.0, 30.0, 16), "oracle_all": np.arange(16.0)}
    for seed in range(2):
        make_result(folder, f"lcd-s{seed}", rows=rows)
        made = make_result(folder, f"rg_lcd-s{seed}", rows=rows, log=[{"step": i, "loss": 1.0 / i} for i in (1, 2, 3)])
    pixels = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3), dtype=np.uint8)
    sheet = [(SheetImage(prompt_id=f"p/{i}", prompt="a circle", seed=i), each) for i, each in enumerate(pixels)]
    assert made.folder is not None
    write_sheet(made.folder, made.head, RUN, sheet)
    scores = {"hps": np.array([[0.0, 2.0]] * 2), "oracle_all": np.array([[0.0, 100.0]] * 2)}
    names = {"world": "benchtop", "model": "rg_lcd-s1", "generation": made.folder.name, "prompts": "0"}
    names["gold"] = "oracle_all"
    groups = (Group(name="", num_prompts=2, picks=picks(scores, ["hps", "oracle_all"]), links=()),)
    found = Headroom(**names, num_prompts=2, samples=2, reward="hps", reward_fields=None, groups=groups)
    write_headroom(made.folder, found)
    give_verdicts(folder, ["rg_lcd-s1"], Declared(headroom=5.0))
    return [*below(made.folder), folder / "benchtop" / "verdict.json"]


def read_results(folder: Path) -> Any:
    (place,) = {path.parent for path in folder.rglob("headroom.json")}
    result = load_result(place)
    rows = [result.rows(*value.key) for value in result.values]
    images = [(about, image.tobytes()) for about, image in result.images.items()]
    used = [(each.keys, each.values.tolist()) for each in rows if each is not None]
    return (
        *(result.head, result.values, result.runs, result.sheet, result.run_of, result.training_log, used, images),
        *(read_headroom(place, ("benchtop", "rg_lcd-s1", place.name)), load_verdicts(folder, "benchtop")),
    )


def make_arena(folder: Path) -> list[Path]:
    with opened(folder, make_models(folder)) as contest:
        for name in ("anna", "안나 <b>"):
            rater = contest.votes.join(name)
            for ticket in list(contest.tasks(name))[:6]:
                vote = contest.vote(rater, ticket, "left", "2026-01-01T00:00:00+00:00")
                assert isinstance(vote, Vote)
                rater.add([vote])
    return below(folder / "arena", "arena.json") + below(folder / "arena" / "votes")


def read_arena(folder: Path) -> Any:
    design = read_design(folder / "arena")
    raters = Votes(folder / "arena" / "votes", design.id).raters
    return design, [(rater.name, rater.kind, list(rater.votes.values())) for rater in raters.values()]


# Caches and indices


def encoded_batch(num: int) -> Batch:
    torch.manual_seed(0)
    states = torch.rand(num, 4, 8)
    prompts, ids = [f"a red circle {i // 2}" for i in range(num)], [f"train/{i}" for i in range(num)]
    same = states[[i // 2 * 2 for i in range(num)]]
    return Batch(None, prompts, ids, Encoded(torch.rand(num, 4, 4, 4), torch.rand(num, 4, 4, 4), same))


class Source:
    name, length = "scenes", 6

    def fingerprint(self) -> dict[str, Any]:
        return {"kind": "scenes"}

    def load(self, indices: list[int]) -> Batch:
        raise AssertionError


def make_latents(folder: Path) -> list[Path]:
    found = LatentsCache.at(folder, {"data": "scenes", "vae": "0" * 64}, 6)
    found.write_shard(found.shard(0)[0], [encoded_batch(6)])
    found.complete()
    return below(folder)


def read_latents(folder: Path) -> Any:
    found = CachedSource(Source(), LatentsCache.at(folder, {"data": "scenes", "vae": "0" * 64}, 6))
    return as_values(found.load(list(range(6))))


def make_teacher_samples(folder: Path) -> list[Path]:
    found = LatentsCache.at(folder, {"kind": "teacher", "teacher": {"sha256": "0" * 64}, "samples": 2}, 6)
    batch = encoded_batch(6)
    found.write_shard(found.shard(0)[0], [Batch(None, batch.prompts, batch.ids, batch.encoded, scores=torch.rand(6))])
    found.complete()
    return below(folder)


def read_teacher_samples(folder: Path) -> Any:
    from rgbench.data.config import TeacherData

    (place,) = {path.parent for path in below(folder)}
    source = TeacherSource(TeacherData(kind="teacher", path=str(place)))
    batch = source.load(list(range(6)))
    return source.fingerprint(), source.length, batch.scores.tolist(), as_values(batch)


def as_values(batch: Batch) -> Any:
    encoded = batch.encoded
    assert encoded is not None
    tensors = (encoded.mean, encoded.std, encoded.prompt_embeds)
    return batch.prompts, batch.ids, [tensor.tolist() for tensor in tensors]


def make_tar(folder: Path) -> list[Path]:
    import io
    import tarfile

    with tarfile.open(folder / "x.tar", "w") as out:
        for name in ("a.png", "a.txt", "b.png", "b.txt", "c.txt"):
            info = tarfile.TarInfo(name)
            info.size = 5
            out.addfile(info, io.BytesIO(b"12345"))
    index_shard(folder / "x.tar")
    return below(folder / "cache")


def read_tar(folder: Path) -> Any:
    index = index_shard(folder / "x.tar")
    return index.keys.tolist(), index.spans.tolist(), index.dropped


class Network:
    name, num_features, smallest = "mean", 3, None

    def fields(self) -> dict[str, Any]:
        return {"network": "mean"}


class Reference:
    """Twelve random inputs, of which some are small."""

    content = "0" * 64

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return 12

    def inputs(self, network: Network) -> Any:
        from types import SimpleNamespace

        torch.manual_seed(0)
        yield SimpleNamespace(inputs=torch.rand(12, 3), num_small=5, converted=("a.png: has 16 bits per channel",))


Network.__call__ = lambda self, inputs: inputs  # type: ignore[attr-defined]


def make_features(folder: Path) -> list[Path]:
    (folder / "real").mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "real" / f"{number}.png")
    read_features(folder)
    return below(folder / "cache")


def read_features(folder: Path) -> Any:
    cache = folder / "cache"
    features = FeatureSet(Reference(cache), Network())  # type: ignore[arg-type]
    array = keep_array(cache, Kind, {"a": 1}, lambda: np.linspace(0.0, 1.0, 50))
    content = ReferenceFolder(folder / "real", cache).content
    notes = features.num_small(), features.num_converted()
    return features.reference_rows().tolist(), notes, array.tolist(), content


class Brightness:
    name, planned = "brightness", ()

    def __init__(self) -> None:
        self.values = np.zeros(4)

    def update(self, images: Tensor, prompts: Any, positions: np.ndarray) -> None:
        self.values[positions] = images.flatten(1).mean(1).numpy()

    def state_dict(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        return {"values": self.values[positions]}

    def merge_state(self, positions: np.ndarray, arrays: dict[str, np.ndarray]) -> None:
        self.values[positions] = arrays["values"]


def unfinished(folder: Path) -> Pass:
    return Pass(folder / ".partial" / "benchtop" / "lcd-s0" / "g-0", [Brightness()], FeatureRows(4, 3), 4, 2)  # type: ignore[list-item]


def make_pass(folder: Path) -> list[Path]:
    found, positions = unfinished(folder), np.arange(4)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (4, 3, 4, 4), dtype=np.uint8))
    found.rows.put(positions, torch.rand(4, 3))
    found.update(ImageBatch(images=images, prompts=["a"] * 4, positions=positions), torch.device("cpu"))  # type: ignore[call-arg]
    found.save(WHOLE, {"config": {"num": 4}})
    return below(folder)


def read_pass(folder: Path) -> Any:
    about = list(stored_shards(folder).values())
    found = unfinished(folder)
    assert found.load(WHOLE), "made again"
    kept = {number: image.tolist() for number, image in found.kept.items()}
    return about, found.metrics[0].values.tolist(), found.rows.everything().tolist(), kept  # type: ignore[attr-defined]


# Weights


def make_checkpoint(folder: Path) -> list[Path]:
    torch.manual_seed(0)
    tensors = {name: {"a.weight": torch.rand(8, 8), "b": torch.rand(3)} for name in ("student", "target", "proxy")}
    tensors["optimiser"] = {"0.exp_avg": torch.rand(8, 8)}
    commit(folder, 7, tensors, {"step": 7, "optimiser": {"state": {"0.step": 7.0}}, "rng": [1, 2, 3]})
    return below(folder)


def read_checkpoint(folder: Path) -> Any:
    place = latest(folder)
    assert place is not None
    tensors, meta = load(place)
    return {stem: {name: v.tolist() for name, v in part.items()} for stem, part in tensors.items()}, meta


def make_proxy(folder: Path) -> list[Path]:
    LatentCLIP.load(WEIGHTS / "latent_proxy", "cpu").save(folder / "latent_proxy")
    return below(folder)


def read_proxy(folder: Path) -> Any:
    check_sums(folder / "latent_proxy")  # first of what LatentCLIP.load does; a whole one is loaded in a test below
    return [path.read_bytes() for path in below(folder) if path.name != "rgbench.sha256"]


def make_student(folder: Path) -> list[Path]:
    write_sums(save_pipeline(folder / "pipeline", student=True))
    return below(folder)


def read_student(folder: Path) -> Any:
    check_folder(folder / "pipeline")  # first of what load_models does
    return weights_sha256(folder / "pipeline")


KINDS = {
    "results": Kind(make_results, read_results),
    "arena": Kind(make_arena, read_arena),
    "latents": Kind(make_latents, read_latents),
    "teacher's samples": Kind(make_teacher_samples, read_teacher_samples),
    "tar index": Kind(make_tar, read_tar),
    "features": Kind(make_features, read_features),
    "unfinished pass": Kind(make_pass, read_pass),
    "checkpoint": Kind(make_checkpoint, read_checkpoint),
    "proxy": Kind(make_proxy, read_proxy),
    "student": Kind(make_student, read_student),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def flip(kind: Kind, folder: Path, num: int, seed: int) -> dict[str, int]:
    """Flip single bits in a kind's files; how many came to which end."""
    files, rng = kind.make(folder), random.Random(seed)
    wanted = kind.read(folder)
    ends = {"refused": 0, "same": 0}
    for _ in range(num):
        file = rng.choice(files)
        whole = file.read_bytes()
        data = bytearray(whole)
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        data[at] ^= 1 << bit
        file.write_bytes(data)
        try:
            found = kind.read(folder)
        except RgbenchError as error:
            assert file.name in str(error) or file.parent.name in str(error), f"names {file.name}: {error}"
            ends["refused"] += 1
        else:
            assert found == wanted, f"bit {bit} of byte {at} of {file.name} was used"
            ends["same"] += 1
        file.write_bytes(whole)
    assert kind.read(folder) == wanted
    return ends


@pytest.mark.parametrize("name", KINDS)
def test_no_flipped_bit_is_used(tmp_path: Path, name: str) -> None:
    ends = flip(KINDS[name], tmp_path, SHORT // len(KINDS), seed=0)
    assert ends["refused"] + ends["same"] == SHORT // len(KINDS)


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_no_flipped_bit_of_thousands_is_used(tmp_path: Path, name: str) -> None:
    ends = flip(KINDS[name], tmp_path, LONG // len(KINDS), seed=1)
    assert ends["refused"] + ends["same"] == LONG // len(KINDS)
