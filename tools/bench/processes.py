"""Benchmarks in fresh processes: diffusers' script, students per hour, all rows of a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rgbench.core.config import packaged_recipes
from rgbench.core.errors import RgbenchError, UsageError, suggest
from rgbench.models.presets import find_preset
from rgbench.train.recipe import load_recipe

DEMO = "demo"
NUM_LAST_CHARACTERS = 800
RGBENCH = (sys.executable, "-m", "rgbench")
LENGTH, OWN_LENGTH = "max_length=77", "max_length=tokenizer.model_max_length"
ENDS, NO_ENDS = "tar_file_expander(streams, ", "tar_file_expander(streams, eof_value=None, "
FULL_SIZE = ("--preset", "sd21-base")
# RG-LCD keeps the decoder's graph of every image, and the plain step beside ours too: the recipe's 16 are too many.
GPU_SETTINGS = {"lcd": (), "rg_lcd": ("train.batch_size=4",), "lrm": ()}
LOW_MEMORY = "train.gradient_checkpointing=true"
GPU_COMMANDS = (
    *(("step", *own, *FULL_SIZE, "--method", name, "--tag", name) for name, own in GPU_SETTINGS.items()),
    *(
        ("step", LOW_MEMORY, *own, *FULL_SIZE, "--method", name, "--tag", f"low-memory-{name}")
        for name, own in GPU_SETTINGS.items()
    ),
    *(("generate", *FULL_SIZE, "--dtype", dtype, "--tag", dtype) for dtype in ("bfloat16", "float32")),
    ("eval", *FULL_SIZE, "--num", "1024"),
)


def run(command: Sequence[str], folder: Path) -> dict[str, float]:
    """Run a command to its end, with caches of its own.

    Args:
        command: words.
        folder: for its caches and its output.

    Returns:
        ``seconds`` from start to end; ``cpu_sec`` of the process and all its children.

    Raises:
        RgbenchError: the command failed; quotes the end of its output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log, environment = folder / "log", os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    with log.open("w", encoding="utf-8") as file:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        said = log.read_text(encoding="utf-8", errors="replace")[-NUM_LAST_CHARACTERS:]
        raise RgbenchError(f"{' '.join(command)} failed with exit code {process.returncode}: {said}")
    return {"seconds": seconds, "cpu_sec": used.ru_utime + used.ru_stime}


def script(
    path: Path, folder: Path, steps: int, rounds: int, overrides: Sequence[str], say: Callable[[str], None]
) -> dict[str, list[float]]:
    """Time ``rgbench train lcd`` and diffusers' LCD script in turn: same tars, teacher, batch and number of steps.

    Args:
        path: a copy of diffusers' ``examples/consistency_distillation/train_lcm_distill_sd_wds.py``.
        folder: an empty one.
        steps: optimiser steps.
        rounds: number of runs of each.
        overrides: ``KEY=VALUE`` settings of our recipe.
        say: prints progress.

    Returns:
        Seconds of ``rgbench`` and of ``diffusers``.

    Raises:
        UsageError: the file is not that script.
        RgbenchError: a command failed.
    """
    text = adapted(path)
    folder.mkdir(exist_ok=True)
    copy, tars = folder / path.name, folder / "tars"
    copy.write_text(text, encoding="utf-8")
    recipe = load_recipe("lcd", list(overrides))
    num = steps * recipe.train.batch_size
    run([*RGBENCH, "export-data", str(tars), "--num", str(num), "--shard-size", str(num)], folder / "export")
    data = f"data={{kind: webdataset, path: {tars}, resolution: 64}}"
    alike = ["train.num_workers=1", "train.sample_every=0"]  # the script takes no fewer, and samples every 200 steps
    ours = [*RGBENCH, "train", "lcd", data, f"train.steps={steps}", *alike, *overrides]
    theirs = [sys.executable, str(copy), *_script_options(recipe, tars, steps)]
    found: dict[str, list[float]] = {"rgbench": [], "diffusers": []}
    for number in range(rounds):
        for name, command, option in (("rgbench", ours, "--out"), ("diffusers", theirs, "--output_dir")):
            place = folder / f"{name}-{number}"
            found[name].append(run([*command, option, str(place / "out")], place)["seconds"])
            say(f"{name}: {found[name][-1]:.1f} s")
    return found


def adapted(path: Path) -> str:
    """Text of diffusers' LCD script, changed where it would not run here.

    It pads empty prompts to CLIP's 77 tokens, whatever the tokenizer's length; and it takes for a file the mark that
    webdataset puts after each tar.

    Raises:
        UsageError: the file is not that script.
    """
    source = path.read_text(encoding="utf-8") if path.is_file() else ""
    for name in (LENGTH, ENDS):
        if name not in source:
            raise UsageError(f"{path}: is not diffusers' train_lcm_distill_sd_wds.py ({name!r} is not in it)")
    return source.replace(LENGTH, OWN_LENGTH).replace(ENDS, NO_ENDS)


def _script_options(recipe: Any, tars: Path, steps: int) -> list[str]:
    """The script's options for a recipe of ours."""
    train, lcd = recipe.train, recipe.lcd
    options: Mapping[str, Any] = {
        "pretrained_teacher_model": find_preset("benchtop").teacher_folder(),
        "train_shards_path_or_url": next(tars.glob("*.tar")),
        "resolution": 64,
        "max_train_steps": steps,
        "max_train_samples": steps * train.batch_size,
        "train_batch_size": train.batch_size,
        "dataloader_num_workers": 1,
        "learning_rate": train.lr,
        "lr_warmup_steps": 0,
        "adam_weight_decay": train.weight_decay,
        "ema_decay": train.ema_decay,
        "w_min": lcd.w_min,
        "w_max": lcd.w_max,
        "loss_type": lcd.loss,
        "huber_c": lcd.huber_c,
        "num_ddim_timesteps": lcd.num_ddim_timesteps,
        "unet_time_cond_proj_dim": lcd.time_cond_proj_dim,
        "seed": recipe.seed,
    }
    return [f"--{name}={value}" for name, value in options.items()]


def students(subject: str, folder: Path, overrides: Sequence[str], num: int) -> dict[str, Any]:
    """Time a recipe from its command to its last file and then ``rgbench eval`` of it; or ``make demo``.

    Args:
        subject: a packaged recipe, or ``demo``.
        folder: an empty one.
        overrides: ``KEY=VALUE`` settings of the recipe, or variables of the Makefile.
        num: images that the recipe's student is evaluated on.

    Returns:
        Seconds and CPU seconds of each command, and the number of students trained and evaluated per hour.

    Raises:
        UsageError: an unknown recipe, or a demo outside rgbench's source folder.
        RgbenchError: a command failed.
    """
    if subject != DEMO and subject not in packaged_recipes():
        raise UsageError(f"{subject}: {suggest(subject, [DEMO, *packaged_recipes()])}")
    if subject == DEMO and not Path("Makefile").is_file():
        raise UsageError(f"{Path.cwd()}: has no Makefile; time the demo in rgbench's source folder")
    out = folder / "out"
    if subject == DEMO:
        run(["make", "install", *overrides], folder / "install")
        stages = {"make demo": run(["make", "demo", f"DEMO={out}", *overrides], folder)}
    else:
        student = out / "runs" / "student"
        stages = {"train": run([*RGBENCH, "train", subject, *overrides, "--out", str(student)], folder)}
        options = ["--num", str(num), "--results", str(out / "results")]
        stages["eval"] = run([*RGBENCH, "eval", str(student), *options], folder)
    seconds = sum(stage["seconds"] for stage in stages.values())
    num = len(list(out.glob("runs/*/run.json")))
    return {"subject": subject, "students": num, "seconds": seconds, "stages": stages,
            "students_per_hour": 3600 * num / seconds}  # fmt: skip


def gpu(out: Path, device: str, say: Callable[[str], None], commands: Sequence[Sequence[str]] = GPU_COMMANDS) -> None:
    """Run all benchmarks that need a GPU, each in a process of its own, so that none finds memory taken.

    Args:
        out: folder of the result files.
        device: ``cuda``.
        say: prints progress.
        commands: words after ``python -m tools.bench``.

    Raises:
        RgbenchError: some failed; raised after all others have run.
    """
    failed = []
    for number, command in enumerate(commands, 1):
        words = ["-m", "tools.bench", *command, "--device", device, "--out", str(out)]
        say(f"[{number}/{len(commands)}] python {' '.join(words)}")
        if subprocess.run([sys.executable, *words]).returncode:
            failed.append(" ".join(command))
    if failed:
        raise RgbenchError(f"{len(failed)} of {len(commands)} failed, with the errors above: {'; '.join(failed)}")
