"""The whole path on tiny models: values stored one by one, skipped when done, refused with a reason."""

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
from rgbench.data.prompts import load_prompts
from rgbench.evaluate.evaluate import sample
from rgbench.evaluate.results import RESULT, SAMPLES, SHEET, ModelResult, NewerResult, load_results
from rgbench.evaluate.targets import resolve_targets
from rgbench.metrics.base import Metric
from rgbench.metrics.values import Direction, Family, MetricInfo, MetricValue, Protocol, metric_info
from rgbench.models.presets import PRESETS
from tests.tiny_models import BENCHTOP, run_eval, save_pipeline, save_run, stored_values

KNOWN = ", ".join(sorted([*PRESETS, "lcd-s1", "rg_lcd-s0", "teacher"]))  # targets of the runs below
LONG = "a small red circle with a thin white border and " * 12


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A folder of runs (one finished, one interrupted) and a pipeline, never written to."""
    root = tmp_path_factory.mktemp("shared")
    save_run(root / "runs" / "rg_lcd-s0", recipe_sha256="ef" * 32)
    save_run(root / "runs" / "lcd-s1", status="interrupted", method="lcd", seed=1, rewards=[])
    save_pipeline(root / "elsewhere" / "my-model", student=False)
    return root


@pytest.fixture
def place(shared, tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(shared: Path, targets: list[str], metrics: list[str], **options) -> list[ModelResult]:
    given = {"num": 6, "runs": shared / "runs", "batch_size": 4, "keep_images": 2}
    return run_eval(targets, metrics, **{**given, **options})


class Flaky(Metric):
    """A metric that fails when it should give its value."""

    name = "flaky"
    infos = (MetricInfo.of("flaky", "Flaky", "made up", Direction.HIGHER, Family.REWARD, decimals=1),)
    default = False

    def __init__(self, context):
        super().__init__(context)
        self.planned = ((self.name, Protocol.of(self.name, context.protocol())),)

    def update(self, images, prompts, positions):
        assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1
        assert torch.equal((images * 255).round() / 255, images), "metrics see what an 8-bit file holds"

    def compute(self):
        raise RgbenchError("the metric broke")


class Unfinite(Flaky):
    def compute(self):
        return [MetricValue(*self.planned[0], value=float("nan"), interval=None, num_images=6)]


class Unplanned(Flaky):
    def compute(self):
        return [MetricValue("other", self.planned[0][1], value=1.0, interval=None, num_images=6)]


class Sound(Flaky):
    def compute(self):
        return [MetricValue(*self.planned[0], value=1.5, interval=None, num_images=6)]


@pytest.fixture
def plugins(monkeypatch):
    for kind in (Flaky, Unfinite, Unplanned, Sound):
        monkeypatch.setitem(TABLES["metric"], kind.__name__.lower(), f"{__name__}:{kind.__name__}")
        monkeypatch.setattr(kind, "name", kind.__name__.lower())


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and ".cache" not in str(path)}


def test_a_run_is_measured_recorded_and_then_left_alone(shared, place):
    (result,) = run(shared, ["rg_lcd-s0"], ["hps", "oracle"])
    head = result.head
    assert (head.world, head.model, head.method, head.training_seed) == ("benchtop", "rg_lcd-s0", "rg_lcd", 0)
    assert (
        head.training == {"step": 3, "steps": 3} and head.recipe_sha256 == "ef" * 32 and len(head.trained_rewards) == 1
    )
    assert head.generation.fields["steps"] == 2 and head.generation.fields["guidance_scale"] == 5.0
    assert head.cost["train_wall_sec"] == 1.5 and head.cost["nfe"] == 2 and head.cost["generate_images_per_sec"] > 0
    values = stored_values()
    assert [value.metric for value in result.values[:2]] == ["hps", "hps_no_antialias"] and len(result.values) == 8
    reward = values["hps_no_antialias"]
    assert reward.in_sample and not values["oracle_mean"].in_sample
    assert reward.protocol.fields["prompts"]["num"] == reward.num_images == 6
    assert reward.protocol.fields["jpeg"] is None
    assert result.runs[0].command.startswith("rgbench eval rg_lcd-s0 --runs")
    assert "--metric hps,oracle" in result.runs[0].command
    assert result.runs[0].provenance["packages"]["torch"] == torch.__version__.split("+")[0]
    rows = reward.rows.by_image()
    assert list(rows) == [(f"{'heldout' if i % 4 == 3 else 'test'}/{i}", 0) for i in range(6)]
    assert np.mean(list(rows.values())) == pytest.approx(reward.value)
    before = stamps(Path("results"))
    (again,) = run(shared, ["rg_lcd-s0"], ["hps", "oracle"])
    assert again.values == result.values and stamps(Path("results")) == before, "nothing was measured again"
    (some,) = run(shared, ["rg_lcd-s0"], ["hps"], force=True)
    assert some.values == result.values[:2], "of this evaluation alone"
    assert stamps(Path("results")) != before and len(stored_values()) == 8


def test_a_newer_result_is_not_overwritten(shared, place):
    (result,) = run(shared, ["rg_lcd-s0"], ["hps"])
    later = (result.folder / RESULT).read_text().replace('"schema_version": 2', '"schema_version": 3', 1)
    (result.folder / RESULT).write_text(later)
    with pytest.raises(NewerResult, match="schema version 3"):
        run(shared, ["rg_lcd-s0"], ["hps"], force=True)
    assert (result.folder / RESULT).read_text() == later


@pytest.mark.parametrize("name", [RESULT, SAMPLES, SHEET])
def test_what_is_damaged_is_measured_again(shared, place, caplog, name):
    (result,) = run(shared, ["rg_lcd-s0"], ["hps", "oracle"])
    good, images = stored_values(), list(result.images)
    data = (result.folder / name).read_bytes()
    (result.folder / name).write_bytes(data[: len(data) // 2])
    (again,) = run(shared, ["rg_lcd-s0"], ["hps", "oracle"])
    assert name in caplog.text
    assert {m: (v.value, v.rows.by_image()) for m, v in stored_values().items()} == {
        m: (v.value, v.rows.by_image()) for m, v in good.items()
    }
    assert list(again.images) == images


def test_the_first_images_are_kept(shared, place):
    (result,) = run(shared, ["rg_lcd-s0"], ["hps"], keep_images=2)
    assert [image.prompt_id for image in result.images] == ["test/0", "test/1"]
    before = {image: pixels.tobytes() for image, pixels in result.images.items()}
    (more,) = run(shared, ["rg_lcd-s0"], ["hps"], keep_images=5)
    assert len(more.images) == 5, "all values were stored: only images were made"
    assert all(more.images[image].tobytes() == pixels for image, pixels in before.items())
    (fewer,) = run(shared, ["rg_lcd-s0"], ["hps"], keep_images=1)
    assert len(fewer.images) == 5
    Path("mine.txt").write_text("a red circle\n")
    (both,) = run(shared, ["rg_lcd-s0"], ["hps"], keep_images=1, prompts="mine.txt", num=None)
    assert next(iter(both.images)).prompt_id == "mine/0" and len(both.images) == 6


def test_every_image_is_saved_on_request(shared, place):
    (result,) = run(shared, ["rg_lcd-s0"], ["hps"], save_images=True, num=3)
    index = json.loads((result.folder / "images" / "index.json").read_text())
    assert [entry["file"] for entry in index] == ["test_0-0.png", "test_1-0.png", "test_2-0.png"]
    assert index[0]["prompt_id"] == "test/0" and index[0]["seed"] == 0 and "noise_seed" in index[0]
    with Image.open(result.folder / "images" / "test_0-0.png") as image:
        assert image.size == (64, 64) and image.mode == "RGB"
        assert image.tobytes() == next(iter(result.images.values())).tobytes()
    before = stamps(result.folder / "images")
    (result.folder / "images" / "test_1-0.png").unlink()
    run(shared, ["rg_lcd-s0"], ["hps"], save_images=True, num=3)
    after = stamps(result.folder / "images")
    changed = {path.name for path in after if after[path] != before.get(path)}
    assert changed == {"test_1-0.png", "index.json"}, "only what was missing"


def test_what_was_measured_before_a_failure_stays(shared, place, plugins):
    with pytest.raises(RgbenchError, match="the metric broke"):
        run(shared, ["rg_lcd-s0"], ["hps", "flaky", "oracle"])
    assert set(stored_values()) == {"hps", "hps_no_antialias"}


@pytest.mark.parametrize(
    ("name", "message"), [("unfinite", "flaky|unfinite is nan; not stored"), ("unplanned", "not .* as planned")]
)
def test_values_that_are_not_sound_are_not_stored(shared, place, plugins, name, message):
    with pytest.raises(RgbenchError, match=message):
        run(shared, ["rg_lcd-s0"], [name])
    assert not [value for result in load_results(Path("results")) for value in result.values]


def test_a_plug_ins_info_is_stored_with_its_values(shared, place, plugins):
    (result,) = run(shared, ["rg_lcd-s0"], ["sound"])
    assert result.values[0].value == 1.5 and result.head.metrics["flaky"].label == "Flaky"
    assert metric_info("flaky", result.head.metrics).decimals == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_signals_keep_what_is_stored_and_say_how_to_continue(shared, place, plugins, monkeypatch, number, code):
    def stop(self):
        os.kill(os.getpid(), number)
        return Sound.compute(self)

    monkeypatch.setattr(Flaky, "compute", stop)
    message = "^Stopped. Finished results are kept; rerun the command to continue.\nresume with: rgbench eval rg_lcd-s0"
    with pytest.raises(Interrupted, match=message) as caught:
        run(shared, ["rg_lcd-s0"], ["hps", "flaky", "oracle"])
    assert caught.value.exit_code == code
    assert set(stored_values()) == {"hps", "hps_no_antialias", "flaky"}


def test_a_second_ctrl_c_interrupts_at_once(shared, place, plugins, monkeypatch):
    def interrupt(self):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second one must not wait")

    monkeypatch.setattr(Flaky, "compute", interrupt)
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
    assert resolve_targets(["benchtop"], runs) == [teacher]


def test_teachers_of_two_worlds_bear_one_name(shared, tmp_path):
    """Both benchtops beside one another: results lie under their worlds, so the names do not clash."""
    flow, bench = PRESETS["benchtop-flow"], BENCHTOP
    pair = resolve_targets(["benchtop-flow", "benchtop"], shared / "runs")
    assert [(target.name, target.world) for target in pair] == [("teacher", flow.name), ("teacher", bench.name)]
    for preset in (flow, bench):
        teacher = {"preset": preset.name, "path": str(preset.teacher), "sha256": "0" * 64}
        save_run(tmp_path / f"lcd-of-{preset.name}-s0", teacher=teacher, world=preset.name)
    found = resolve_targets([], tmp_path)
    assert [(target.name, target.preset) for target in found] == [
        *(("teacher", flow), ("teacher", bench)),
        *(("lcd-of-benchtop-flow-s0", flow), ("lcd-of-benchtop-s0", bench)),
    ]


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
    with pytest.raises(UsageError) as caught:
        resolve_targets([f"{tmp_path.name}/nope"], Path(tmp_path.name))
    assert "hf download" not in str(caught.value), "a path under the runs is no hub id"


def test_another_teacher_goes_by_its_hash(shared, tmp_path, caplog):
    for name, path in (("a-s0", shared / "elsewhere" / "my-model"), ("b-s0", tmp_path / "gone")):
        teacher = {"preset": None, "path": str(path), "sha256": "ab12cd34" + "0" * 56}
        save_run(tmp_path / "runs" / name, teacher=teacher, world="my-model")
    targets = resolve_targets([], tmp_path / "runs")
    assert [target.name for target in targets] == ["teacher-ab12cd34", "a-s0", "b-s0"]
    assert {target.world for target in targets} == {"my-model"} and {target.preset for target in targets} == {None}
    assert "gone" in caplog.text


@pytest.mark.parametrize(
    ("targets", "metrics", "options", "message"),
    [
        (["rg_lcd-s0"], ["fidd"], {}, "unknown metric 'fidd'; did you mean 'fid'"),
        (["rg_lcd-s0"], [], {"hps": Path("no.pt")}, "--hps: no.pt: no such file"),
        (["rg_lcd-s0"], ["hps"], {"judge": ["pickscore=no"]}, "--judge pickscore: no: no such file"),
        (["rg_lcd-s0"], ["hps"], {"results": Path("two.txt")}, "--results two.txt: is a file"),
        (["rg_lcd-s0"], ["hps"], {"sampler": "ddim"}, "its guidance embedding says that it is an LCM"),
        (["rg_ldc-s0"], ["hps"], {}, f"did you mean 'rg_lcd-s0'.*known: {KNOWN}"),
        (["lcd-s1"], ["hps"], {}, "interrupted at step 3 of 9; finish it first with: rgbench train .*yaml --out"),
        (["{shared}/elsewhere"], ["hps"], {}, "neither a run .no run.json. nor a diffusers pipeline"),
        (["rg_lcd-s0"], ["hps"], {"steps": 51}, "cannot sample in 51 steps"),
        (["rg_lcd-s0"], ["hps"], {"device": "tpu"}, "--device 'tpu'"),
        (["rg_lcd-s0"], ["hps"], {"prompts": "missing.txt"}, "missing.txt"),
        (["rg_lcd-s0"], ["hps"], {"prompts": "empty.txt", "num": None}, "empty.txt: holds no prompt"),
        (["rg_lcd-s0"], ["hps"], {"prompts": "two.txt", "num": 3}, "cannot take 3 of 2"),
        (["rg_lcd-s0"], ["hps", "fid"], {"prompts": "two.txt", "num": None}, "fid: two: prompt 'two/0' has no scene"),
        (["rg_lcd-s0"], ["fid"], {"num": 3}, "at least 4 images, not 3"),
    ],
)  # fmt: skip
def test_wrong_usage_is_explained_and_writes_nothing(shared, place, targets, metrics, options, message):
    Path("empty.txt").write_text("\n\n")
    Path("two.txt").write_text("a red circle\na cat\n")
    before = sorted(place.rglob("*"))
    with pytest.raises(UsageError, match=message):
        run(shared, [target.format(shared=shared) for target in targets], metrics, **options)
    assert sorted(place.rglob("*")) == before


def test_no_finished_run_is_explained(tmp_path):
    with pytest.raises(UsageError, match="no finished run under .*train one with: rgbench train"):
        run_eval([], ["hps"], runs=tmp_path / "runs", results=tmp_path / "results")


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


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", ".hidden", ""])
def test_a_runs_names_cannot_lead_out_of_the_results(shared, place, name):
    """``world`` and ``method`` of a run from elsewhere become folders and rows."""
    folder = shutil.copytree(shared / "runs" / "rg_lcd-s0", place / "runs" / "evil-s0")
    meta = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(meta | {"world": name}))
    before = sorted(place.rglob("*"))
    with pytest.raises(UsageError, match="world|cannot name a folder"):
        run(shared, [str(folder)], ["hps"], num=2)
    assert sorted(place.rglob("*")) == before


def test_a_folder_that_cannot_name_a_row_is_refused(shared, place):
    shutil.copytree(shared / "elsewhere" / "my-model", place / ".hidden")
    with pytest.raises(UsageError, match="'.hidden' cannot name a folder of results; rename it"):
        run(shared, [".hidden"], ["hps"])


def test_prompts_from_a_file_without_scenes(shared, place):
    Path("two.txt").write_text("a red circle\na cat on a mat\n")
    run(shared, ["rg_lcd-s0"], ["hps"], prompts="two.txt", num=None)
    found = stored_values()["hps"]
    assert found.protocol.fields["prompts"]["name"] == "two" and found.num_images == 2


# What must not be measured as if it were the benchtop's


def test_a_model_of_another_world_needs_prompts_of_its_own(shared, place):
    save_pipeline(place / "larger", student=False, sample_size=16)
    save_run(place / "runs" / "other-s0", world="my-model")
    for target in ("larger", "other-s0"):
        with pytest.raises(UsageError, match=f"{target} is not a benchtop model .*--prompts.*--reference"):
            run_eval([target], ["hps"], num=2, runs=place / "runs")
    assert not Path("results").exists()


def test_scenes_are_no_reference_of_larger_images(shared, place, caplog):
    save_pipeline(place / "larger", student=False, sample_size=16)
    with pytest.raises(UsageError, match="metric kid: .*64 px.*128 px.*--reference"):
        run_eval(["larger"], ["kid"], num=2, steps=1, prompts="benchtop")
    (result,) = run_eval(["larger"], [], num=2, steps=1, prompts="benchtop", hps=BENCHTOP.reward_folder())
    assert result.head.world == "full-size" and "left out: fid, kid, prdc, vendi" in caplog.text.replace("oracle, ", "")
    assert not {"fd_efflite0", "kd_efflite0"} & {value.metric for value in result.values}


def test_whatever_changes_an_image_changes_the_generation(shared, place):
    """Scheduler, UNet configuration, scaling factor, tokenizer: with the same weights."""
    folder = shutil.copytree(shared / "elsewhere" / "my-model", place / "my-model")
    changes = {
        "scheduler/scheduler_config.json": {"beta_end": 0.02},
        "vae/config.json": {"scaling_factor": 0.5},
        "tokenizer/tokenizer_config.json": {"model_max_length": 16},
        "unet/config.json": {"norm_eps": 1e-3},
    }
    ids = [run_eval([str(folder)], ["kid"], num=2, steps=1)[0].head.generation.id]
    for name, change in changes.items():
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | change))
        ids.append(run_eval([str(folder)], ["kid"], num=2, steps=1)[0].head.generation.id)
    assert len(set(ids)) == 5
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"_diffusers_version": "0"}))
    assert run_eval([str(folder)], ["kid"], num=2, steps=1)[0].head.generation.id == ids[-1], "a note changes nothing"


def test_prompts_that_readers_cut_are_counted(shared, place, caplog):
    Path("long.txt").write_text(f"{LONG} and a cat\n{LONG} and no cat\na red circle\n")
    (result,) = run(shared, ["rg_lcd-s0"], ["hps"], prompts="long.txt", num=None)
    assert "the text encoder reads 32 tokens: 2 of 3 prompts are longer and are cut" in caplog.text
    captions = result.runs[0].provenance["captions"]
    assert captions["seen"] == 3 and captions["cut"]["text_encoder"] == 2 and captions["cut"]["hps"] == 2
    assert len(load_prompts("long.txt")) == 3


def test_guidance_below_none_is_reported(shared, place, caplog):
    run(shared, ["rg_lcd-s0"], ["hps"], guidance=0.5, num=2)
    run(shared, ["teacher"], ["hps"], guidance=-1.0, num=2, steps=1)
    assert "rg_lcd-s0: guidance 0.5 is below 1" in caplog.text and "w = -0.5" in caplog.text
    assert "teacher: guidance -1 is below 1" in caplog.text


# Samples


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
