"""Options of an evaluation, once: the command line, the configuration, and the command that repeats it are the same."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from rgbench.cli.options import options_from
from rgbench.core.errors import UsageError
from rgbench.evaluate.config import EvalConfig
from tests.conftest import Cli

EVERYTHING: dict[str, Any] = {
    "targets": ("a", "b c"),
    "base": "benchtop",
    "unet": Path("u"),
    "checkpoints": True,
    "runs": Path("r"),
    "prompts": "p.txt",
    "num": 3,
    "seeds": "0-2",
    "sampler": "lcm",
    "steps": 2,
    "guidance": 1.5,
    "pipeline_kwargs": ("height=64", "call.yaml"),
    "offload": True,
    "vae_slicing": True,
    "dtype": "bfloat16",
    "batch_size": 4,
    "device": "cpu",
    "shard": "1/2",
    "metrics": ("fid", "hps"),
    "protocol": "coco17-5k",
    "reference": Path("real"),
    "inception": Path("i"),
    "hps": Path("h"),
    "judge": ("pickscore=x", "mine=y z.yaml"),
    "results": Path("out"),
    "force": True,
    "keep_images": 0,
    "save_images": True,
}


def parsed(words: list[str]) -> EvalConfig:
    """The configuration that a command line gives."""
    seen: list[EvalConfig] = []
    app = typer.Typer()

    @app.command(name="eval")
    @options_from(EvalConfig, complete={})
    def evaluate(config: EvalConfig) -> None:
        seen.append(config)

    @app.command()
    def other() -> None: ...

    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return seen[0]


def test_every_option_survives_the_command_line_and_a_file():
    config = EvalConfig(**EVERYTHING)
    assert set(EVERYTHING) | {"lora", "lora_weight"} == set(EvalConfig.model_fields)
    assert all(getattr(config, name) == value for name, value in EVERYTHING.items())
    program, *words = shlex.split(config.command())
    assert program == "rgbench" and parsed(words) == config
    assert EvalConfig(**config.model_dump(mode="json")) == config


def test_a_command_names_what_differs_from_the_defaults():
    assert EvalConfig().command() == "rgbench eval" and parsed(["eval"]) == EvalConfig()
    config = EvalConfig(targets=("a", "b"), metrics=("hps",), judge=("clip_score=x", "pickscore=y z"), save_images=True)
    expected = "rgbench eval a b --metric hps --judge clip_score=x --judge 'pickscore=y z' --save-images"
    assert config.command() == expected


def test_every_option_has_its_help(cli: Cli):
    shown = cli("eval", "--help").stdout
    for name, info in EvalConfig.model_fields.items():
        assert (EvalConfig.flag(name) in shown) == (name != "targets"), name
        assert info.description and info.description.split()[0] in shown


@pytest.mark.parametrize("given", [["fid", "hps"], ["fid,hps"], "fid, hps,fid", ("FID", "hps")])
def test_metrics_are_names_in_any_form(given):
    assert EvalConfig(metrics=given).metrics == ("fid", "hps")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["fdi"]}, "unknown metric 'fdi'; did you mean 'fid'"),
        ({"metrics": ["all"]}, "leave out --metric"),
        ({"metrics": ""}, "with no name in it"),
        ({"metrics": ["mine"]}, "unknown metric 'mine'"),
        ({"judge": ["pickscore"]}, "--judge 'pickscore': expected NAME=PATH"),
        ({"protocol": "coco14"}, "did you mean 'coco14-30k'"),
        ({"num": 0}, "--num 0: .*greater than or equal to 1"),
        ({"keep_images": -1}, "--keep-images -1"),
        ({"batch_size": "x"}, "--batch-size 'x'"),
        ({"guidance": float("nan")}, "--guidance nan"),
        ({"sampler": "dim"}, "--sampler 'dim': .*'ddim', 'lcm' or 'tcd'"),
        ({"seeds": "a"}, "--seeds 'a'"),
        ({"shard": "3"}, "--shard '3'"),
        ({"unet": "x"}, "--unet and --lora need --base"),
        ({"base": "sd15"}, "--base takes one of --unet PATH and --lora PATH"),
        ({"base": "sd15", "unet": "x", "lora": "y"}, "--base takes one of"),
        ({"metric": ["fid"]}, "unknown option 'metric'; did you mean 'metrics'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UsageError, match=message) as caught:
        EvalConfig(**options)
    assert "Value error" not in str(caught.value)


def test_the_name_of_a_judge_is_a_metric():
    assert EvalConfig(metrics=["mine"], judge=["mine=x.yaml"]).metrics == ("mine",)
