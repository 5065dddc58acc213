"""Which runs a resume goes on with, and which it refuses: configuration, contents, older versions, more steps."""

from __future__ import annotations

import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rgbench.core.errors import UsageError
from rgbench.core.io import SUMS, read_json, write_json_atomic
from rgbench.core.run import RunDirectory
from rgbench.train.train import train

WORDS = ["train.sample_every=0", "train.log_every=1"]


def test_seeds_of_one_method_share_it_in_run_json_and_card(recipe, tmp_path):
    digests = {}
    for name, words in {"0": [], "1": ["seed=1", "name=other", "train.save_every=1"], "lr": ["train.lr=1e-4"]}.items():
        run = RunDirectory.open(train(str(recipe), ["train.steps=1", *WORDS, *words], out=tmp_path / name))
        digests[name] = run.read()["recipe_sha256"]
        assert digests[name] in (run.pipeline / "README.md").read_text()
    assert digests["0"] == digests["1"] != digests["lr"]


def without_reward(recipe, kind):
    """A recipe of a distillation alone, on the same data and teacher."""
    values, file = yaml.safe_load(recipe.read_text()), recipe.with_name(f"{kind}.yaml")
    kept = {key: values[key] for key in ("name", "model", "data", "train", "lcd", "sampling")}
    if kind != "lcd":
        del kept["lcd"]["timestep_scaling"]
    if kind == "mlcm":
        kept |= {"mlcm": {"stages": [{"segments": 2}]}}
    file.write_text(yaml.safe_dump({"kind": kind, **kept}))
    return file


@pytest.mark.parametrize(("kind", "key"), [("tcd", "tcd.s"), ("mlcm", "mlcm.space"), ("mlcm", "lcd.teacher_steps")])
def test_a_newer_methods_run_goes_on_without_a_key_and_with_more_steps(recipe, tmp_path, kind, key):
    """A key that its configuration lacks counts as its default; another value of it is another run."""
    own = without_reward(recipe, kind)
    run = interrupted(own, tmp_path / "run")
    section, name = key.split(".")
    edit(run, lambda config: config[section].pop(name))
    other = {"tcd.s": "next", "mlcm.space": "x0", "lcd.teacher_steps": 2}[key]
    with pytest.raises(UsageError, match=rf"another config \({key}: "):
        train(str(own), ["train.steps=2", *WORDS, f"{key}={other}"], out=run.path)
    train(str(own), ["train.steps=3", "train.save_every=1", *WORDS], out=run.path)
    assert run.read()["status"] == "finished" and run.read()["steps"] == 3
    straight = RunDirectory.open(train(str(own), ["train.steps=3", *WORDS], out=tmp_path / "straight"))
    wanted, found = weights(straight), weights(run)
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)


def interrupted(recipe, out, words=()):
    """A run of two steps that ends as if it had been stopped after the first."""
    run = RunDirectory.open(train(str(recipe), ["train.steps=2", "train.save_every=1", *WORDS, *words], out=out))
    shutil.rmtree(run.checkpoints / "step-00000002")
    run.update(status="interrupted", step=1)
    return run


def edit(run: RunDirectory, change) -> None:
    config = yaml.safe_load(run.config_file.read_text())
    change(config)
    run.config_file.write_text(yaml.safe_dump(config, sort_keys=False))


def test_a_run_older_than_a_key_is_resumed_with_its_default(recipe, tmp_path):
    run = interrupted(recipe, tmp_path / "run")
    edit(run, lambda config: [config["guidance"].pop("max_scale"), config["lcd"].pop("huber_c"), config.pop("lora")])
    meta = run.read()
    for part in ("proxy", "recipe_sha256"):
        del meta[part]
    del meta["teacher"]["config_sha256"], meta["data"]["hashed"]
    meta["data"]["sha256"] = "of names and sizes, not of contents"
    write_json_atomic(run.run_file, meta)
    with pytest.raises(UsageError, match=r"another config \(lcd\.huber_c: 0\.001 → 0\.5\)"):
        train(str(recipe), ["train.steps=2", *WORDS, "lcd.huber_c=0.5"], out=run.path)
    train(str(recipe), ["train.steps=2", "train.save_every=1", *WORDS], out=run.path)
    assert run.read()["status"] == "finished" and len(run.read()["recipe_sha256"]) == 64
    assert "huber_c: 0.001" in run.config_file.read_text()


def test_a_run_with_keys_that_moved_says_where_they_are_now(recipe, tmp_path):
    run = interrupted(recipe, tmp_path / "run")
    edit(run, lambda config: config["reward"].update(scale=config.pop("guidance")["scale"]))
    with pytest.raises(UsageError, match=r"config\.yaml:\d+:reward\.scale: moved to guidance\.scale.*edit its config"):
        train(str(recipe), ["train.steps=2", *WORDS], out=run.path)


def weights(run: RunDirectory) -> dict[str, torch.Tensor]:
    newest = max(run.checkpoints.iterdir())
    return {f"{f.stem}/{k}": v for f in sorted(newest.glob("*.safetensors")) for k, v in load_file(f).items()}


def test_more_steps_of_a_constant_schedule_go_on_to_the_same_weights(recipe, tmp_path):
    """A finished run of two steps, taken to four, is the run of four."""
    straight = RunDirectory.open(train(str(recipe), ["train.steps=4", *WORDS], out=tmp_path / "straight"))
    longer = RunDirectory.open(train(str(recipe), ["train.steps=2", *WORDS], out=tmp_path / "longer"))
    train(str(recipe), ["train.steps=4", *WORDS], out=longer.path)
    wanted, found = weights(straight), weights(longer)
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    one, other = straight.read(), longer.read()
    assert (other["step"], other["steps"], other["status"]) == (4, 4, "finished")
    assert one["recipe_sha256"] == other["recipe_sha256"] and "steps: 4" in longer.config_file.read_text()
    with pytest.raises(UsageError, match=r"train\.steps 3: 4 steps are done already"):
        train(str(recipe), ["train.steps=3", *WORDS], out=longer.path)


def test_more_steps_of_a_schedule_that_ends_are_another_run(recipe, tmp_path):
    words = [*WORDS, "proxy.optimiser.schedule=linear"]
    path = train(str(recipe), ["train.steps=1", *words], out=tmp_path / "run")
    with pytest.raises(UsageError, match=r"another config \(train\.steps: 1 → 2\)"):
        train(str(recipe), ["train.steps=2", *words], out=path)


def change_json(file, **fields) -> None:
    write_json_atomic(file, read_json(file) | fields)


CHANGES = {
    "scheduler": lambda teacher: change_json(teacher / "scheduler" / "scheduler_config.json", beta_end=0.02),
    "vae": lambda teacher: change_json(teacher / "vae" / "config.json", scaling_factor=0.5),
    "unet": lambda teacher: change_json(teacher / "unet" / "config.json", norm_eps=1e-3),
    "text_encoder": lambda teacher: change_json(teacher / "text_encoder" / "config.json", layer_norm_eps=1e-3),
    "tokenizer": lambda teacher: change_json(teacher / "tokenizer" / "tokenizer_config.json", pad_token="a"),
}


@pytest.mark.parametrize("kind", ["lcd", "tcd", "mlcm"])
def test_what_a_teacher_computes_may_not_change_either(world, recipe, tmp_path, kind):
    """Its weights stay; its noise schedule, scaling factor, networks' settings or tokenizer do not."""
    lcd = without_reward(recipe, kind)
    shutil.copytree(world / "teacher", tmp_path / "own")
    run = interrupted(lcd, tmp_path / "run", [f"model.path={tmp_path / 'own'}"])
    for name, change in CHANGES.items() if kind == "lcd" else [("scheduler", CHANGES["scheduler"])]:
        teacher = tmp_path / name
        shutil.copytree(world / "teacher", teacher)
        words = ["train.steps=2", "train.save_every=1", *WORDS, f"model.path={teacher}"]
        change(teacher)
        with pytest.raises(UsageError, match=rf"its teacher changed.*\(configuration of the {name}\)"):
            train(str(lcd), words, out=run.path)
    file = tmp_path / "own" / "unet" / "config.json"
    change_json(file, _diffusers_version="9.9")  # saved again by another version
    train(str(lcd), ["train.steps=2", "train.save_every=1", *WORDS, f"model.path={tmp_path / 'own'}"], out=run.path)
    assert run.read()["status"] == "finished"


def test_another_proxy_is_noticed(world, recipe, tmp_path):
    run = interrupted(recipe, tmp_path / "run")
    shutil.copytree(world / "proxy", tmp_path / "proxy")
    words = ["train.steps=2", "train.save_every=1", *WORDS, f"proxy.path={tmp_path / 'proxy'}"]
    change_json(tmp_path / "proxy" / "tokenizer_config.json", pad_token="a")
    (tmp_path / "proxy" / SUMS).unlink()
    with pytest.raises(UsageError, match=r"its proxy changed.*\(sha256\)"):
        train(str(recipe), words, out=run.path)
