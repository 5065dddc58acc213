"""Page of an arena: one HTML text that asks a server, or holds everything a rater is asked.

It loads nothing from elsewhere. No name of a model is in it, and images have no order that would tell them apart.
"""

from __future__ import annotations

import base64
import random
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from rgbench.arena.contest import Contest, Task
from rgbench.arena.pairs import QUESTIONS
from rgbench.arena.votes import Rater

POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'"
)


def render_page(data: dict[str, Any]) -> str:
    """The page.

    Args:
        data: ``mode`` is "server", or "file" with everything that :func:`export_page` gives.
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    text = (files("rgbench.arena") / "page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(text).render(data=data, policy=POLICY)


def task_data(contest: Contest, rater: str, task: Task) -> dict[str, Any]:
    """What a page learns of a question, but for its images."""
    asked = contest.comparisons(rater)[task.comparison]
    text = contest.design.prompts[asked.prompt].text
    return {"ticket": task.ticket, "prompt": text, "question": QUESTIONS[task.question]}


def export_page(contest: Contest, rater: Rater) -> str:
    """A page for a rater without access to the machine: questions and images in one file.

    Args:
        contest: that is open.
        rater: whose questions they are; those that he answered are left out.
    """
    asked = contest.comparisons(rater.name)
    tasks = [task for ticket, task in contest.tasks(rater.name).items() if ticket not in rater.votes]
    wanted = {contest.side(asked[task.comparison], side) for task in tasks for side in ("left", "right")}
    images = sorted(wanted)
    random.Random(contest.sign("export", rater.name)).shuffle(images)
    place = {image: number for number, image in enumerate(images)}
    data = {
        "mode": "file",
        "arena": contest.design.id,
        "rater": rater.name,
        "images": [f"data:image/png;base64,{base64.b64encode(image).decode()}" for image in images],
        "tasks": [
            task_data(contest, rater.name, task)
            | {side: place[contest.side(asked[task.comparison], side)] for side in ("left", "right")}
            for task in tasks
        ],
    }
    return render_page(data)
