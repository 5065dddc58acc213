"""Prompt lists in which every prompt stands several times: several images of each, of noise of their own.

The k-th copy of a prompt goes by its id and ``#k``. Noise is a function of the id, so each
copy starts from its own; with a scene, each is compared with a real scene of its own.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from rgbench.data.prompts import PromptSet
from rgbench.errors import UsageError
from rgbench.files import write_text_atomic

COPY = re.compile(r"#\d+$")


def repeat_prompts(prompts: PromptSet, times: int) -> PromptSet:
    """Each prompt ``times`` times in a row.

    Raises:
        UsageError: fewer than two times.
    """
    if times < 2:
        raise UsageError(f"repeat prompts at least 2 times, not {times}")
    copies = [replace(prompt, id=f"{prompt.id}#{k}") for prompt in prompts.prompts for k in range(times)]
    return PromptSet(f"{prompts.name} × {times}", tuple(copies))


def without_copy(prompt_id: str) -> str:
    """The id of the prompt that a copy was made of; of any other, its own."""
    return COPY.sub("", prompt_id)


def write_prompts(prompts: PromptSet, path: Path) -> Path:
    """Write a list as .jsonl, with groups and scenes, to be given to ``rgbench eval --prompts``.

    Raises:
        UsageError: the file is no .jsonl, or is there already.
    """
    if path.suffix != ".jsonl":
        raise UsageError(f"{path}: prompts with ids are written as .jsonl; choose such a name")
    if path.exists():
        raise UsageError(f"{path}: exists already; nothing was overwritten. Choose another name")
    rows = []
    for prompt in prompts.prompts:
        row = {"id": prompt.id, "text": prompt.text, "group": prompt.group}
        rows.append(json.dumps(row | ({"scene": prompt.scene} if prompt.scene else {}), ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, "\n".join(rows) + "\n")
    return path
