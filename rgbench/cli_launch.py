"""``--launch``: several processes on this machine or on many, or a Slurm script that starts them."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated

import typer

from rgbench.errors import UsageError


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
    from rgbench.trainers.recipe import load_recipe

    settings = load_recipe(recipe, overrides)
    arguments = [verb, recipe, *overrides, *options]
    if launch is Launch.slurm:
        if nproc is None:
            raise UsageError("--launch slurm: say how many GPUs a machine has with --nproc N")
        from rgbench.launch.slurm import slurm_script

        typer.echo(slurm_script(arguments, settings.name, nproc, nodes), nl=False)
        return
    from rgbench.launch.start import start_ddp

    words = launch_words(launch, nproc, nodes, head)
    raise typer.Exit(start_ddp([*arguments, *words], nproc, nodes, head))
