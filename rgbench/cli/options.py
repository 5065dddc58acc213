"""Shared command-line options, errors as one message and an exit code, and options made from a configuration model."""

from __future__ import annotations

import errno
import inspect
import logging
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum, StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.core import TyperGroup

from rgbench.core.errors import Interrupted, RgbenchError, UsageError
from rgbench.core.process import pick_device, tune

SETTINGS: dict[str, Any] = {"no_args_is_help": True, "pretty_exceptions_enable": False, "add_completion": False}

_DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ENOENT),
}

_Usage: Any = typer.BadParameter.__base__  # the usage error of typer's click

M = TypeVar("M", bound=BaseModel)


class ExplainingGroup(TyperGroup):
    """Turns our errors into one message on stderr and their exit code; a bug keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Interrupted as error:
            typer.echo(str(error), err=True)
            raise typer.Exit(error.exit_code) from error
        except RgbenchError as error:
            complain(str(error))
            raise typer.Exit(error.exit_code) from error
        except _Usage as error:
            error.message = error.message.removeprefix("Value error, ")  # of pydantic, with which typer checks
            verb = error.ctx.command if hasattr(error, "option_name") and error.ctx else None  # an option it lacks
            if verb is not None and any(parameter.name == "overrides" for parameter in verb.params):
                error.message += "; settings of the recipe are KEY=VALUE, like train.steps=10"
            raise
        except KeyboardInterrupt as error:
            typer.echo("Stopped.", err=True)
            raise typer.Exit(130) from error
        except OSError as error:
            if error.errno not in _DISK_ERRORS:
                raise
            complain(f"{error.filename or 'disk'}: {error.strerror}; fix this and rerun the command")
            raise typer.Exit(1) from error


def complain(message: str) -> None:
    """Print one error on stderr, never broken into lines."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text("error: ", "bold red") + Text(message), soft_wrap=True)


# Options that several commands have


class Device(StrEnum):
    """Where models run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Launch(StrEnum):
    """How the processes of a run are started."""

    ddp = "ddp"
    slurm = "slurm"


OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes of the recipe, e.g. train.lr=1e-4.")
]
DeviceOption = Annotated[Device, typer.Option(help="Device; auto takes a GPU if there is one.")]
RunsOption = Annotated[Path, typer.Option(help="Folder of runs.")]
ResultsOption = Annotated[Path, typer.Option(help="Folder of results.")]
StepsOption = Annotated[int | None, typer.Option(min=1, help="Sampling steps. Default: the model's own.")]
GuidanceOption = Annotated[
    float | None, typer.Option(help="Guidance scale as in diffusers' pipelines. Default: the model's own.")
]
PipelineKwargsOption = Annotated[
    list[str] | None,
    typer.Option(help="Arguments of the pipeline's own call, or a YAML file of them.", metavar="KEY=VALUE"),
]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16"], typer.Option(help="Floating type of the generating networks.")
]
OffloadOption = Annotated[
    bool, typer.Option("--offload", help="Keep on the GPU only the network of a called pipeline that runs.")
]
LaunchOption = Annotated[
    Launch | None, typer.Option(help="ddp: train in several processes; slurm: print a job script that does.")
]
NprocOption = Annotated[int | None, typer.Option(min=1, help="Processes per machine. Default: one per GPU.")]
NodesOption = Annotated[int, typer.Option(min=1, help="Machines; give the same command on each.")]
HeadOption = Annotated[str | None, typer.Option(help="HOST:PORT where several machines meet, the same on each.")]


# Options made from a model


def options_from(
    model: type[M], complete: Mapping[str, Callable[[str], list[str]]]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command whose function takes a configuration model: one option for each of the model's fields.

    Args:
        model: frozen; each field has a description and, in ``json_schema_extra``, ``panel``, ``flag``, ``metavar`` and
            ``positional``.
        complete: shell completions, by field.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        others = list(inspect.signature(command).parameters.values())[1:]
        own = [each.replace(annotation=hints[each.name], kind=inspect.Parameter.KEYWORD_ONLY) for each in others]
        made = [_parameter(name, info, complete.get(name)) for name, info in model.model_fields.items()]

        def call(**values: Any) -> None:
            given = {name: values.pop(name) for name in model.model_fields}
            command(model(**{name: _plain(value) for name, value in given.items() if value is not None}), **values)

        parameters = [*made, *own]
        call.__name__, call.__doc__ = command.__name__, command.__doc__
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return call

    return decorate


def _parameter(name: str, info: FieldInfo, complete: Callable[[str], list[str]] | None) -> inspect.Parameter:
    """The typer parameter of a model's field."""
    extra: Any = info.json_schema_extra
    settings: dict[str, Any] = {"help": info.description, "rich_help_panel": extra["panel"]}
    if extra["metavar"]:
        settings["metavar"] = extra["metavar"]
    if complete is not None:
        settings["autocompletion"] = complete
    for limit in info.metadata:
        settings["min"] = limit.ge
    kind: Any = info.annotation
    default, enum = info.default, cast("Any", StrEnum)
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(each for each in get_args(kind) if each is not type(None))
    if get_origin(kind) is Literal:
        kind = enum(name, {choice: choice for choice in get_args(kind)})
        default = default and kind(default)
    elif get_origin(kind) is tuple:
        kind, default = list[str], None
    flag = extra["flag"] or f"--{name.replace('_', '-')}"
    option = typer.Argument(**settings) if extra["positional"] else typer.Option(flag, **settings)
    kind = kind | None if default is None else kind
    annotation: Any = Annotated[kind, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


# Shell completion: without torch


def complete_metrics(incomplete: str) -> list[str]:
    """Metrics, after those that are there already: ``fid,h`` gives ``fid,hps``."""
    from rgbench.core.registry import names

    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in (*names("metric"), *names("probe")) if name.startswith(last)]


def complete_recipes(incomplete: str) -> list[str]:
    """Packaged recipes."""
    from rgbench.core.config import packaged_recipes

    return [name for name in packaged_recipes() if name.startswith(incomplete)]


def complete_runs(incomplete: str) -> list[str]:
    """Runs under ``runs``, and the teacher."""
    found = sorted(file.parent.name for file in Path("runs").glob("*/run.json"))
    return [name for name in (*found, "teacher") if name.startswith(incomplete)]


def complete_shown(incomplete: str) -> list[str]:
    """What ``rgbench show`` takes by name: recipes and runs."""
    return [*complete_recipes(incomplete), *(name for name in complete_runs(incomplete) if name != "teacher")]


def check_results_folder(folder: Path) -> Path:
    """The folder, where there is one: answered before torch is imported."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder of results; make some with: rgbench eval")
    return folder


ResultsArgument = Annotated[Path, typer.Argument(help="Folder of results.", callback=check_results_folder)]
RecipeArgument = Annotated[
    str, typer.Argument(help="A YAML file, or the name of a packaged recipe.", autocompletion=complete_recipes)
]


# The process


def say_what_matters() -> None:
    """Show our log lines on stderr, each once; handlers of whoever calls us in its own process stay as they are."""
    handler = logging.StreamHandler()
    handler.addFilter(_Once())
    logging.basicConfig(format="%(message)s", handlers=[handler])
    logging.getLogger("rgbench").setLevel(logging.INFO)


class _Once(logging.Filter):
    """Lets each message through once: what is left out for one model is left out for all."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in self._seen
        self._seen.add(message)
        return new


def ready(device: Device) -> str:
    """Tune the process before torch is imported; then ``cpu`` or ``cuda``.

    Raises:
        UsageError: ``cuda`` where there is none.
    """
    tune()
    return pick_device(device.value)


def print_paths(paths: Iterable[Path]) -> None:
    """Print one path per line on stdout."""
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


def launch_words(launch: Launch | None, nproc: int | None, nodes: int, head: str | None) -> list[str]:
    """The options of a launch as they were given, for the command that continues it.

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
        recipe: checked here, so that a fault in it is reported once.
        overrides: of the recipe.
        options: other options of the verb, for every process.
        launch: how.
        nproc: processes per machine.
        nodes: machines.
        head: where they meet.

    Raises:
        ConfigError: a recipe that cannot be used.
        UsageError: too little given about the processes.
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
