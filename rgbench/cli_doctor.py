"""``rgbench doctor``: is this environment sound, has a recipe what it needs, does the code give the golden numbers."""

from __future__ import annotations

from typing import Annotated

import typer

from rgbench.cli_shared import OverridesArgument, tune


def doctor(
    recipe: Annotated[str | None, typer.Argument(help="List what this recipe needs instead.")] = None,
    overrides: OverridesArgument = None,
    golden: Annotated[list[str] | None, typer.Option(help="Replay a golden file instead: its path, no suffix.")] = None,
) -> None:
    """Check this environment, or what a recipe needs, or replay golden numbers through the code that trains."""
    from rgbench.listing import print_checks, print_golden

    tune()
    passed = print_golden(golden) if golden else print_checks(recipe, overrides or [])
    if not passed:
        raise typer.Exit(1)
