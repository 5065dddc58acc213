"""The whole path on tiny models: figures stored one by one, skipped when done, refused with a reason."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rgbench.core.errors import Interrupted, RgbenchError, UsageError
from rgbench.core.io import file_stem
from rgbench.core.registry import TABLES
from rgbench.evaluate.evaluate import evaluate, sample
from rgbench.evaluate.results import load_results, load_samples
from rgbench.evaluate.targets import resolve_targets
from rgbench.metrics.base import Measurement, Metric, Quantity
from tests.tiny_models import BENCHTOP, save_pipeline, save_run

CONFIG = "kind: rg_lcd\nseed: 0\n"


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A folder of runs (one finished, one interrupted) and a pipeline, never written to."""
    root = tmp_path_factory.mktemp("shared")
    save_run(root / "runs" / "rg_lcd-s0")
    save_run(root / "runs" / "lcd-s1", status="interrupted", method="lcd", seed=1, rewards=[])
    save_pipeline(root / "elsewhere" / "my-model", student=False)
    return root


@pytest.fixture
def place(shared, tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(shared: Path, targets: list[str], metrics: list[str], **options) -> list[Path]:
    given = {"num": 6, "runs": shared / "runs", "batch_size": 4, "device": "cpu", "keep_images": 2}
    return evaluate(targets, metrics, **{**given, **options})


class Flaky:
    """A metric that fails when it should give its figure."""

    def __init__(self, context):
        metric = Metric(name="flaky", label="Flaky", direction="lower", unit="", family="reward", decimals=1)
        self.quantities = (Quantity(metric, context.protocol()),)

    def update(self, images, prompts, positions):
        assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1
        assert torch.equal((images * 255).round() / 255, images), "metrics see what an 8-bit file holds"

    def finish(self):
        raise RgbenchError("the figure broke")


class Unfinite(Flaky):
    """A metric that gives no number."""

    def finish(self):
        return [Measurement(self.quantities[0], float("nan"), None, 6)]


@pytest.fixture
def flaky(monkeypatch):
    for name, target in (("flaky", "Flaky"), ("unfinite", "Unfinite")):
        monkeypatch.setitem(TABLES["metric"], name, f"{__name__}:{target}")


def test_a_run_is_measured_recorded_and_then_left_alone(shared, place):
    files = run(shared, ["rg_lcd-s0"], ["hps", "oracle"])
    results = {result.metric.name: result for result in load_results(Path("results"))}
    assert {path.resolve() for path in files} == {result.path.resolve() for result in results.values()}
    assert len(files) == 8
    reward = results["hps_aa0"]
    assert (reward.world, reward.model, reward.method, reward.training_seed) == ("benchtop", "rg_lcd-s0", "rg_lcd", 0)
    assert reward.in_sample and len(reward.trained_rewards) == 1
    assert not results["oracle_mean"].in_sample
    assert reward.generation.fields["steps"] == 2 and reward.generation.fields["guidance_scale"] == 5.0
    assert reward.protocol.fields["prompts"]["num"] == reward.num_samples == 6
    assert reward.protocol.fields["jpeg"] is None
    assert (
        reward.cost["train_wall_sec"] == 1.5 and reward.cost["nfe"] == 2 and reward.cost["generate_images_per_sec"] > 0
    )
    assert reward.command.startswith("rgbench eval rg_lcd-s0 --metric hps,oracle --num 6")
    assert reward.provenance["packages"]["torch"] == torch.__version__.split("+")[0]
    rows = load_samples(reward)
    assert list(rows) == [(f"{'heldout' if i % 4 == 3 else 'test'}/{i}", 0) for i in range(6)]
    assert np.mean(list(rows.values())) == pytest.approx(reward.value)
    stamps = {path: path.stat().st_mtime_ns for path in files}
    assert run(shared, ["rg_lcd-s0"], ["hps", "oracle"]) == files
    assert {path: path.stat().st_mtime_ns for path in files} == stamps, "nothing was measured again"
    later = files[0].read_text().replace('"schema_version": 1', '"schema_version": 2', 1)
    files[0].write_text(later)
    with pytest.raises(UsageError, match="schema version 2; this rgbench reads 1: install the rgbench that wrote it"):
        run(shared, ["rg_lcd-s0"], ["hps"])
    assert files[0].read_text() == later, "what a later rgbench measured is not lost"
    assert run(shared, ["rg_lcd-s0"], ["hps"], force=True) == files[:2]
    assert all((path.stat().st_mtime_ns > stamps[path]) == (path in files[:2]) for path in files)
    assert load_samples(load_results(Path("results"))[0]) is not None


def test_images_are_kept_with_an_index(shared, place):
    (file, _) = run(shared, ["rg_lcd-s0"], ["hps"], keep_images=2)
    folder = file.parent / "images"
    index = json.loads((folder / "index.json").read_text())
    assert [entry["file"] for entry in index] == ["test_0-0.png", "test_1-0.png"]
    assert index[0]["prompt_id"] == "test/0" and index[0]["seed"] == 0 and "noise_seed" in index[0]
    with Image.open(folder / "test_0-0.png") as image:
        assert image.size == (64, 64) and image.mode == "RGB"
    before = (folder / "test_0-0.png").stat().st_mtime_ns
    run(shared, ["rg_lcd-s0"], ["hps"], keep_images=5)
    assert len(json.loads((folder / "index.json").read_text())) == 5, "all figures were there: only images were made"
    assert (folder / "test_0-0.png").stat().st_mtime_ns == before


def test_what_was_measured_before_a_failure_stays(shared, place, flaky):
    with pytest.raises(RgbenchError, match="the figure broke"):
        run(shared, ["rg_lcd-s0"], ["hps", "flaky", "oracle"])
    kept = {result.metric.name for result in load_results(Path("results"))}
    assert kept == {"hps_aa1", "hps_aa0"}


def test_a_figure_that_is_not_finite_is_not_stored(shared, place, flaky):
    with pytest.raises(RgbenchError, match="rg_lcd-s0: metric flaky is nan; not stored"):
        run(shared, ["rg_lcd-s0"], ["unfinite"])
    assert not load_results(Path("results"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_signals_keep_what_is_stored_and_say_how_to_go_on(shared, place, flaky, monkeypatch, number, code):
    monkeypatch.setattr(Flaky, "finish", lambda self: os.kill(os.getpid(), number) or [])
    message = "stay\nresume with: rgbench eval rg_lcd-s0 --metric hps,flaky,oracle --num 6"
    with pytest.raises(Interrupted, match=message) as caught:
        run(shared, ["rg_lcd-s0"], ["hps", "flaky", "oracle"])
    assert caught.value.exit_code == code
    assert len(load_results(Path("results"))) == 2


def test_a_second_ctrl_c_interrupts_at_once(shared, place, flaky, monkeypatch):
    def interrupt(self):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second one must not wait")

    monkeypatch.setattr(Flaky, "finish", interrupt)
    with pytest.raises(Interrupted, match="resume with: rgbench eval") as caught:
        run(shared, ["rg_lcd-s0"], ["flaky"])
    assert caught.value.exit_code == 130


def test_without_targets_every_finished_run_and_its_teacher(shared, caplog):
    targets = resolve_targets([], shared / "runs")
    assert [(t.name, t.method) for t in targets] == [("teacher", "teacher"), ("rg_lcd-s0", "rg_lcd")]
    assert "lcd-s1: left out: interrupted at step 3 of 9; finish it first with: rgbench train" in caplog.text


def test_targets_by_folder_and_by_name(shared):
    runs = shared / "runs"
    by_name = resolve_targets(["rg_lcd-s0"], runs)
    assert by_name == resolve_targets([str(runs / "rg_lcd-s0")], runs)
    assert by_name == resolve_targets([str(runs / "rg_lcd-s0" / "pipeline"), "rg_lcd-s0"], runs)
    (pipeline,) = resolve_targets([str(shared / "elsewhere" / "my-model")], runs)
    assert (pipeline.name, pipeline.method, pipeline.rewards) == ("my-model", "external", ())
    (teacher,) = resolve_targets(["teacher"], runs)
    assert teacher.folder == BENCHTOP.teacher_folder()


def test_a_hub_id_is_found_in_the_cache_or_the_command_that_gets_it_is_named(shared, tmp_path, monkeypatch):
    repo = tmp_path / "models--someone--my-student"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc123")
    shutil.copytree(shared / "elsewhere" / "my-model", repo / "snapshots" / "abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (found,) = resolve_targets(["someone/my-student"], shared / "runs")
    assert found.name == "my-student" and (found.folder / "model_index.json").is_file()
    with pytest.raises(UsageError, match="if it is a hub id, get it with: hf download someone/other"):
        resolve_targets(["someone/other"], shared / "runs")


def test_another_teacher_goes_by_its_hash(shared, tmp_path, caplog):
    for name, path in (("a-s0", shared / "elsewhere" / "my-model"), ("b-s0", tmp_path / "gone")):
        teacher = {"preset": None, "path": str(path), "sha256": "ab12cd34" + "0" * 56}
        save_run(tmp_path / "runs" / name, teacher=teacher, world="my-model")
    targets = resolve_targets([], tmp_path / "runs")
    assert [target.name for target in targets] == ["teacher-ab12cd34", "a-s0", "b-s0"]
    assert {target.world for target in targets} == {"my-model"}
    assert "gone" in caplog.text


@pytest.mark.parametrize(
    ("targets", "metrics", "options", "message"),
    [
        (["rg_lcd-s0"], ["fidd"], {}, "unknown metric 'fidd'; did you mean 'fid'"),
        (["rg_lcd-s0"], [], {"hps": Path("no.pt")}, "--hps: no.pt: no such file or folder"),
        (["rg_lcd-s0"], ["hps"], {"judge": ["pickscore=no"]}, "--judge pickscore: no: no such file or folder"),
        (["rg_lcd-s0"], ["hps"], {"results": Path("two.txt")}, "--results two.txt: is a file; name the folder"),
        (["rg_lcd-s0"], ["hps"], {"sampler": "ddim"}, "its guidance embedding says that it is an LCM"),
        (["rg_ldc-s0"], ["hps"], {}, "did you mean 'rg_lcd-s0'.*known: lcd-s1, rg_lcd-s0, teacher"),
        (
            ["lcd-s1"],
            ["hps"],
            {},
            "interrupted at step 3 of 9; finish it first with: rgbench train .*config.yaml --out",
        ),
        (["{shared}/elsewhere"], ["hps"], {}, "neither a run .no run.json. nor a diffusers pipeline"),
        (["rg_lcd-s0"], ["hps"], {"steps": 51}, "cannot sample in 51 steps"),
        (["rg_lcd-s0"], ["hps"], {"device": "tpu"}, "unknown device"),
        (["rg_lcd-s0"], ["hps"], {"prompts": "missing.txt"}, "missing.txt"),
        (["rg_lcd-s0"], ["hps"], {"prompts": "empty.txt", "num": None}, "empty.txt: holds no prompt"),
        (["rg_lcd-s0"], ["hps"], {"prompts": "two.txt", "num": 3}, "cannot take 3 of 2"),
        (
            ["rg_lcd-s0"],
            ["hps", "fid"],
            {"prompts": "two.txt", "num": None},
            "metric fid: two: prompt 'two/0' has no scene",
        ),
        (["rg_lcd-s0"], ["fid"], {"num": 3}, "at least 4 images, not 3"),
    ],
)
def test_wrong_usage_is_explained_and_writes_nothing(shared, place, targets, metrics, options, message):
    Path("empty.txt").write_text("\n\n")
    Path("two.txt").write_text("a red circle\na cat\n")
    before = sorted(place.rglob("*"))
    with pytest.raises(UsageError, match=message):
        run(shared, [target.format(shared=shared) for target in targets], metrics, **options)
    assert sorted(place.rglob("*")) == before


def test_no_finished_run_is_explained(tmp_path):
    with pytest.raises(UsageError, match="no finished run under .*train one with: rgbench train"):
        evaluate([], ["hps"], runs=tmp_path / "runs", results=tmp_path / "results", device="cpu")


def test_damaged_run_files_are_named(shared, tmp_path):
    folder = shutil.copytree(shared / "runs" / "rg_lcd-s0", tmp_path / "x-s0")
    meta = json.loads((folder / "run.json").read_text())
    del meta["sampling"]
    (folder / "run.json").write_text(json.dumps(meta))
    with pytest.raises(UsageError, match="run.json: lacks sampling"):
        resolve_targets([str(folder)], tmp_path)
    (folder / "run.json").write_text("{")
    with pytest.raises(UsageError, match="run.json: not valid JSON"):
        resolve_targets([str(folder)], tmp_path)


def test_prompts_from_a_file_without_scenes(shared, place):
    Path("two.txt").write_text("a red circle\na cat on a mat\n")
    run(shared, ["rg_lcd-s0"], ["hps"], prompts="two.txt", num=None)
    (aa0, _) = load_results(Path("results"))
    assert aa0.protocol.fields["prompts"]["name"] == "two" and aa0.num_samples == 2


def test_sample_gives_the_same_image_for_the_same_words(shared, place):
    first = sample("rg_lcd-s0", ["a red circle", "a blue star"], out=Path("a"), runs=shared / "runs", device="cpu")
    second = sample("rg_lcd-s0", ["a blue star", "a red circle"], out=Path("b"), runs=shared / "runs", device="cpu")
    assert [path.name for path in first] == [path.name for path in reversed(second)]
    assert first[0].read_bytes() == second[1].read_bytes() != first[1].read_bytes()
    other = sample("rg_lcd-s0", ["a red circle"], out=Path("a"), runs=shared / "runs", device="cpu", steps=1)
    assert other[0] not in first, "other settings have another name"
    index = json.loads(Path("a/index.json").read_text())
    assert [entry["prompt"] for entry in index] == ["a red circle", "a blue star", "a red circle"]
    assert [entry["steps"] for entry in index] == [2, 2, 1]
    with pytest.raises(UsageError, match="at least one prompt"):
        sample("rg_lcd-s0", [" "], out=Path("a"), runs=shared / "runs", device="cpu")


def test_file_stems_are_plain_and_distinct():
    assert file_stem("heldout/3") == "heldout_3"
    names = ["a/b", "a_b", "a b", "../../etc/passwd", "a" * 200, "ä/ö", ".", "con/../x", "", "a b!", "日本"]
    stems = [file_stem(name) for name in names]
    assert len(set(stems)) == len(names)
    assert all(len(stem) <= 80 and not set(stem) & set('/\\:*?"<>| ') and not stem.startswith(".") for stem in stems)
