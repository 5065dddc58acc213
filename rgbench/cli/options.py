"""What all verbs share: options, the way errors are shown, the process made ready.

``--launch``: several processes on this machine or on many, or a Slurm script that starts them.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rgbench.core.errors import RgbenchError, UsageError

SETTINGS: dict[str, Any] = {"no_args_is_help": True, "pretty_exceptions_enable": False, "add_completion": False}

_DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
}


class Device(StrEnum):
    """Where models run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(StrEnum):
    """Floating types of the networks that make images."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Sampler(StrEnum):
    """Ways from noise to an image."""

    ddim = "ddim"
    lcm = "lcm"


class Kind(StrEnum):
    """What ``rgbench ls`` lists."""

    recipes = "recipes"
    metrics = "metrics"
    probes = "probes"
    rewards = "rewards"
    workers = "workers"
    runs = "runs"
    results = "results"
    protocols = "protocols"


class ExplainingGroup(TyperGroup):
    """Turns our errors into one message on stderr and their exit code; a bug keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except RgbenchError as error:
            complain(str(error))
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            complain("interrupted")
            raise typer.Exit(130) from error
        except OSError as error:
            if error.errno not in _DISK_ERRORS:
                raise
            complain(f"{error.filename or 'disk'}: {error.strerror}; mend this and run the same command again")
            raise typer.Exit(1) from error


def complain(message: str) -> None:
    """One message on stderr, never broken into lines."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text("error: ", "bold red") + Text(message), soft_wrap=True)


OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings over the recipe's, like train.lr=1e-4.")
]
DeviceOption = Annotated[Device, typer.Option(help="auto takes a CUDA GPU where there is one.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Of the networks that make images; metrics are float32.")]
RunsOption = Annotated[Path, typer.Option(help="Folder of runs.")]
ResultsOption = Annotated[Path, typer.Option(help="Folder of result files.")]
StepsOption = Annotated[int | None, typer.Option(min=1, help="Sampling steps; the model's own by default.")]
GuidanceOption = Annotated[float | None, typer.Option(help="Guidance scale, in the pipelines' form.")]


def say_what_matters() -> None:
    """Our log lines on stderr: a checkpoint passed over, a run that goes on. Other libraries keep quiet."""
    import logging

    logging.basicConfig(format="%(message)s")
    logging.getLogger("rgbench").setLevel(logging.INFO)


def tune() -> None:
    """Set threads and allocator, unless torch runs already (as in a notebook): then it is too late."""
    from rgbench.core.process import tune_process

    if "torch" not in sys.modules:
        tune_process()


def ready(device: Device) -> str:
    """Tune the process before torch is imported; then ``cpu`` or ``cuda``.

    Raises:
        UsageError: ``cuda`` where there is none.
    """
    tune()
    from rgbench.core.process import pick_device

    return pick_device(device.value)


def print_paths(paths: Iterable[Path]) -> None:
    """One path per line on stdout."""
    for path in paths:
        typer.echo(path)


def split_names(values: Iterable[str] | None) -> list[str]:
    """Names from an option given several times, or with commas.

    Raises:
        UsageError: it was given, and holds none; an option that is not given means all.
    """
    given = list(values or [])
    found = [name.strip() for value in given for name in value.split(",") if name.strip()]
    if given and not found:
        raise UsageError(f"{','.join(given)!r}: an option with no name in it; name one, or leave the option out")
    return found


class Launch(StrEnum):
    """How the processes of a run are started."""

    ddp = "ddp"
    slurm = "slurm"


LaunchOption = Annotated[
    Launch | None, typer.Option(help="ddp: train in several processes; slurm: print a job script that does.")
]
NprocOption = Annotated[int | None, typer.Option(min=1, help="Processes per machine; by default one per GPU.")]
NodesOption = Annotated[int, typer.Option(min=1, help="Machines; the same command is given on each.")]
HeadOption = Annotated[str | None, typer.Option(help="HOST:PORT where several machines meet, the same on each.")]


def launch_words(launch: Launch | None, nproc: int | None, nodes: int, head: str | None) -> list[str]:
    """The options of a launch as they were given, for the command that goes on with it.

    Raises:
        UsageError: an option that says nothing without --launch.
    """
    given = [("--nproc", nproc), ("--nodes", nodes if nodes > 1 else None), ("--head", head)]
    words = [word for option, value in given if value is not None for word in (option, str(value))]
    if launch is None and words:
        raise UsageError(f"{words[0]}: needs --launch ddp or --launch slurm")
    return ["--launch", launch.value, *words] if launch else []


def start_processes(
    verb: str,
    recipe: str,
    overrides: list[str],
    options: Sequence[str],
    launch: Launch,
    nproc: int | None,
    nodes: int,
    head: str | None,
) -> None:
    """Start the run's processes and wait for them, or print the job script that will.

    Args:
        verb: ``train`` or ``cache``.
        recipe: checked here, so that a fault in it is said once.
        overrides: of the recipe.
        options: other options of the verb, for every process.
        launch: where.
        nproc: processes per machine.
        nodes: machines.
        head: where they meet.

    Raises:
        ConfigError: a recipe that cannot be used.
        UsageError: too little said about the processes.
        RgbenchError: a process was killed.
    """
    from rgbench.train.recipe import load_recipe

    settings = load_recipe(recipe, overrides)
    arguments = [verb, recipe, *overrides, *options]
    if launch is Launch.slurm:
        if nproc is None:
            raise UsageError("--launch slurm: say how many GPUs a machine has with --nproc N")
        from rgbench.core.launch import slurm_script

        typer.echo(slurm_script(arguments, settings.name, nproc, nodes), nl=False)
        return
    from rgbench.core.launch import start_ddp

    words = launch_words(launch, nproc, nodes, head)
    raise typer.Exit(start_ddp([*arguments, *words], nproc, nodes, head))
