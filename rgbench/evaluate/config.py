"""Evaluation options, each in one place.

``rgbench eval`` builds its options from :class:`EvalConfig`, the Python API takes it, shards store it, and results
record the command line that it makes. Imports no torch, so that a wrong option is answered at once.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rgbench.core.config import apply_overrides, load_yaml
from rgbench.core.errors import UsageError, suggest
from rgbench.core.registry import names
from rgbench.metrics.protocols import find_protocol

BENCHTOP = "benchtop"  # --prompts that names no file
BLOCK = 64  # no longer than the default batch: the batches of a shard are then batches of the whole, byte for byte
_MODELS, _IMAGES, _METRICS, _RESULTS = "What to evaluate", "Images", "Metrics", "Results"


def _option(
    default: Any,
    description: str,
    panel: str,
    metavar: str = "",
    *,
    flag: str = "",
    positional: bool = False,
    **limits: Any,
) -> Any:
    """A field with what the command line shows of it; ``flag`` where the option has another name."""
    extra: dict[str, Any] = {"panel": panel, "flag": flag, "metavar": metavar, "positional": positional}
    return Field(default, description=description, json_schema_extra=extra, **limits)


class EvalConfig(BaseModel):
    """What one evaluation measures, and how.

    Raises:
        UsageError: an unknown name, a value out of range, or options that do not go together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)  # --help builds none

    targets: tuple[str, ...] = _option(
        (),
        "Runs, pipeline folders, hub ids, folders of images, or presets for their teachers. Default: all finished "
        "runs and their teachers.",
        _MODELS,
        "TARGET",
        positional=True,
    )
    base: str | None = _option(
        None, "Preset, pipeline folder or hub id that --unet or --lora was trained from.", _MODELS, "NAME"
    )
    unet: Path | None = _option(None, "Student's UNet, a folder or weight file; needs --base.", _MODELS, "PATH")
    lora: Path | None = _option(None, "LoRA, a folder or weight file; needs --base.", _MODELS, "PATH")
    lora_weight: float = _option(1.0, "Weight of --lora, a factor of its own scale.", _MODELS, "FACTOR")
    checkpoints: bool = _option(False, "Evaluate the checkpoints of each run too.", _MODELS)
    runs: Path = _option(Path("runs"), "Folder of runs.", _MODELS, "FOLDER")

    prompts: str | None = _option(
        None,
        "File (.txt, .jsonl, .tsv, COCO .json), HPSv2's folder, or benchtop. Default for benchtop models: benchtop.",
        _IMAGES,
        "FILE",
    )
    num: int | None = _option(
        None,
        "Number of prompts. Default: all of the file, the protocol's number, or 2048 of benchtop.",
        _IMAGES,
        "N",
        ge=1,
    )
    seeds: str = _option("0", "Noise seeds, e.g. 0,1,7 or 0-7. One image per prompt and seed.", _IMAGES, "NUMBERS")
    sampler: Literal["ddim", "lcm", "tcd"] | None = _option(None, "Sampler. Default: the model's own.", _IMAGES)
    steps: int | None = _option(None, "Sampling steps. Default: the model's own.", _IMAGES, "N", ge=1)
    guidance: float | None = _option(
        None, "Guidance scale as in diffusers' pipelines; 1 is none. Default: the model's own.", _IMAGES, "SCALE"
    )
    pipeline_kwargs: tuple[str, ...] = _option(
        (),
        "Arguments of the pipeline's own call, e.g. height=1024, or a YAML file; SD 1 and 2 are then called too.",
        _IMAGES,
        "KEY=VALUE",
    )
    offload: bool = _option(False, "Keep on the GPU only the network of a called pipeline that runs.", _IMAGES)
    vae_slicing: bool = _option(False, "Decode the images of a called pipeline one by one.", _IMAGES)
    dtype: Literal["float32", "bfloat16", "float16"] = _option(
        "float32", "Floating type of the generating networks; metrics use float32.", _IMAGES
    )
    batch_size: int | None = _option(None, "Images per batch. Default: what fits into memory.", _IMAGES, "N", ge=1)
    device: Literal["auto", "cpu", "cuda"] = _option("auto", "Device; auto takes a GPU if there is one.", _IMAGES)
    shard: str | None = _option(
        None,
        "Make one share of the images, e.g. 3/64, or auto under torchrun or Slurm; then: rgbench merge.",
        _IMAGES,
        "K/N",
    )

    metrics: tuple[str, ...] = _option(
        (),
        "Metrics, e.g. fid,hps; see: rgbench ls metrics. Default: all that need no further download and fit.",
        _METRICS,
        "NAMES",
        flag="--metric",
    )
    protocol: str | None = _option(
        None, "Published protocol of fid and kid; see: rgbench ls protocols.", _METRICS, "NAME"
    )
    reference: Path | None = _option(None, "Folder of real images for set metrics and probes.", _METRICS, "FOLDER")
    inception: Path | None = _option(
        None, "Inception network of --protocol. Default: from its usual place.", _METRICS, "FILE"
    )
    hps: Path | None = _option(
        None, "Reward model: HPS checkpoint or open_clip folder. Default: the world's.", _METRICS, "PATH"
    )
    judge: tuple[str, ...] = _option(
        (), "Weights of a held-out reward, e.g. pickscore=PATH, or any reward, NAME=FILE.yaml.", _METRICS, "NAME=PATH"
    )

    results: Path = _option(Path("results"), "Folder of results.", _RESULTS, "FOLDER")
    force: bool = _option(False, "Measure again what is stored already.", _RESULTS)
    keep_images: int = _option(
        64, "Number of images kept for the report; at most 8 of a checkpoint.", _RESULTS, "N", ge=0
    )
    save_images: bool = _option(False, "Save every image as PNG.", _RESULTS)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            key = str(fault["loc"][0]) if fault["loc"] else ""
            if fault["type"] == "extra_forbidden":
                raise UsageError(f"unknown option {key!r}; {suggest(key, type(self).model_fields)}") from error
            raise UsageError(f"{self.flag(key)} {fault['input']!r}: {fault['msg']}") from error

    @field_validator("metrics", mode="before")
    @classmethod
    def _split(cls, given: str | Iterable[str]) -> tuple[str, ...]:
        """Names from "fid,hps", or from several such texts; each once, in any case."""
        texts = [given] if isinstance(given, str) else list(given)
        found = [name.strip() for text in texts for name in text.split(",") if name.strip()]
        if texts and not found:
            raise UsageError(f"--metric {','.join(texts)!r}: an option with no name in it; name one, or leave it out")
        known = {*names("metric"), *names("probe")}
        return tuple(dict.fromkeys(name if name in known else name.lower() for name in found))

    @model_validator(mode="after")
    def _check(self) -> EvalConfig:
        own = [text.partition("=")[0] for text in self.judge]
        known = [*names("metric"), *names("probe"), *own]
        for name in self.metrics:
            if name == "all":
                raise UsageError("--metric all: leave out --metric to measure every metric that can run")
            if name not in known:
                raise UsageError(f"unknown metric '{name[:80]}'; {suggest(name, known)}")
        for text in self.judge:
            if not all(text.partition("=")[::2]):
                raise UsageError(f"--judge {text!r}: expected NAME=PATH, such as pickscore=FOLDER")
        if self.protocol is not None:
            find_protocol(self.protocol)
        if self.base is None and (self.unet or self.lora):
            raise UsageError("--unet and --lora need --base: the preset or folder that the student was trained from")
        if self.base is not None and (self.unet is None) == (self.lora is None):
            raise UsageError("--base takes one of --unet PATH and --lora PATH: the student that was trained from it")
        if self.lora_weight != 1 and self.lora is None:
            raise UsageError("--lora-weight: is the weight of a LoRA; give it with --lora")
        parse_seeds(self.seeds)
        if self.shard not in (None, "auto"):
            parse_shard(self.shard)
        return self

    @classmethod
    def flag(cls, field: str) -> str:
        """The option of a field, such as ``--batch-size``."""
        extra = cls.model_fields[field].json_schema_extra if field in cls.model_fields else None
        return str((isinstance(extra, dict) and extra["flag"]) or f"--{field.replace('_', '-')}")

    def command(self) -> str:
        """The command line that repeats this evaluation: what differs from the defaults."""
        words = ["rgbench", "eval", *self.targets]
        for name in type(self).model_fields:
            value, flag = getattr(self, name), self.flag(name)
            if name == "targets" or value == type(self).model_fields[name].default:
                continue
            if value is True:
                words.append(flag)
            elif name == "metrics":
                words += [flag, ",".join(value)]
            else:
                words += [
                    word for each in (value if isinstance(value, tuple) else (value,)) for word in (flag, str(each))
                ]
        return shlex.join(words)

    def call_arguments(self) -> dict[str, Any]:
        """Arguments of a pipeline's own call; a later one holds over an earlier.

        Raises:
            UsageError: no such file, or not KEY=VALUE.
        """
        found: dict[str, Any] = {}
        for text in self.pipeline_kwargs:
            if re.match(r"[A-Za-z_]\w*=", text):
                found = apply_overrides(found, [text])
            elif Path(text).is_file():
                found |= load_yaml(text)[0]
            else:
                raise UsageError(f"--pipeline-kwargs {text!r}: neither KEY=VALUE nor a YAML file")
        return found

    def check_files(self) -> None:
        """Check that the given files exist.

        Raises:
            UsageError: one does not.
        """
        self.call_arguments()
        judges = {f"--judge {name}": Path(path) for name, _, path in (text.partition("=") for text in self.judge)}
        prompts = None if self.prompts in (None, BENCHTOP) else Path(str(self.prompts))
        given = {"--hps": self.hps, "--reference": self.reference, "--prompts": prompts, **judges}
        for flag, path in given.items():
            if path is not None and not path.exists():
                raise UsageError(f"{flag}: {path}: no such file or folder")
        if self.results.exists() and not self.results.is_dir():
            raise UsageError(f"--results {self.results}: is a file; name a folder")


def parse_seeds(text: str) -> list[int]:
    """Noise seeds from ``0,1,7`` or ``0-7``.

    Raises:
        UsageError: not of this form, or one seed twice.
    """
    seeds: list[int] = []
    for part in text.split(","):
        ends = part.strip().split("-")
        if len(ends) > 2 or not all(end.isascii() and end.isdigit() for end in ends):
            raise UsageError(f"--seeds {text!r}: expected numbers from 0, such as 0,1,7 or 0-7")
        seeds += range(int(ends[0]), int(ends[-1]) + 1)
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {text!r}: names {'no seed' if not seeds else 'a seed twice'}")
    return seeds


@dataclass(frozen=True)
class Shard:
    """One share of an evaluation's images.

    Position p of the prompts belongs to share (p // block) mod count, whatever the batch size.

    Attributes:
        index: from 1.
        count: of all shares.
    """

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def positions(self, num: int) -> list[int]:
        """Those of ``num`` positions that belong to this share.

        Raises:
            UsageError: there are more shares than images.
        """
        if self.count > num:
            raise UsageError(f"--shard {self}: {num} images cannot be shared by {self.count}; use at most {num} shards")
        block = max(1, min(BLOCK, num // self.count))
        return [position for position in range(num) if position // block % self.count == self.index - 1]


WHOLE = Shard(1, 1)


def parse_shard(text: str | None, environment: Mapping[str, str] | None = None) -> Shard:
    """A share from ``3/64``, or from the launcher with ``auto``.

    Args:
        text: of the option; None for all images.
        environment: of the process; torchrun sets RANK and WORLD_SIZE, a Slurm array SLURM_ARRAY_TASK_ID,
            SLURM_ARRAY_TASK_MIN, SLURM_ARRAY_TASK_STEP and SLURM_ARRAY_TASK_COUNT.

    Raises:
        UsageError: not of this form, out of range, or ``auto`` without a launcher.
    """
    if text is None:
        return WHOLE
    environment = os.environ if environment is None else environment
    if text == "auto":
        if "RANK" in environment and "WORLD_SIZE" in environment:
            text = f"{_number(environment, 'RANK') + 1}/{environment['WORLD_SIZE']}"
        elif "SLURM_ARRAY_TASK_ID" in environment and "SLURM_ARRAY_TASK_COUNT" in environment:
            names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_STEP", "SLURM_ARRAY_TASK_COUNT")
            task, first, step, count = (_number(environment, name) for name in names)
            if step < 1 or (task - first) % step:
                raise UsageError(
                    "--shard auto: the Slurm array has gaps; submit --array=1-N, or give it as --shard 3/64"
                )
            text = f"{(task - first) // step + 1}/{count}"
        else:
            raise UsageError("--shard auto: neither torchrun (RANK) nor a Slurm array; give it as --shard 3/64")
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--shard {text!r}: give K/N with K from 1 to N, such as 3/64, or auto")
    return Shard(int(match[1]), int(match[2]))


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_STEP": "1"}.get(name, ""))
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise UsageError(f"--shard auto: {name} is {value!r:.40}, not a number; give it as --shard 3/64")
    return int(value)
