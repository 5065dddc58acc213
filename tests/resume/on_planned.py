"""What a recipe's loop takes, as torch's profiler measures it; started as ``python -m tests.resume.on_planned FOLDER``.

Of two gloo ranks that train ``FOLDER/recipe.yaml``, the main one writes ``FOLDER/measured.json``.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from rgbench.core.launch import Ranks
from rgbench.core.run import RunDirectory
from rgbench.train.recipe import load_recipe
from rgbench.train.train import build_loop
from tools.bench.timing import count_flops


def measured(file: Path, folder: Path, ranks: Ranks) -> tuple[int, int]:
    """Peak bytes in the second step, with all that it found alive, and the FLOPs of a third one; of this rank.

    The profiler does not see what gloo's threads free. An address that is given out again was freed.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loop, _ = build_loop(load_recipe(str(file)), RunDirectory(folder / "run"), ranks)
        loop.train_step()
        with record_function("second step"):
            loop.train_step()
    events = list(every(profiler.profiler.kineto_results.experimental_event_tree()))  # type: ignore[union-attr]
    (step,) = (event for event in events if event.name == "second step")
    allocations = (event for event in events if event.tag == _EventType.Allocation)
    alive, total, peak = dict[int, int](), 0, 0
    for event in sorted(allocations, key=lambda event: event.start_time_ns):
        address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        total -= alive.pop(address, 0)
        if size > 0:
            alive[address] = size
            total += size
        if step.start_time_ns <= event.start_time_ns <= step.end_time_ns:
            peak = max(peak, total)
    return peak, count_flops(loop.train_step)


def every(events: list[Any]) -> Iterator[Any]:
    """Events with those inside them."""
    for event in events:
        yield event
        yield from every(event.children)


def main(folder: Path) -> None:
    ranks = Ranks.join("cpu")
    assert ranks.size == 2
    found = measured(folder / "recipe.yaml", folder, ranks)
    ranks.on_main(lambda: (folder / "measured.json").write_text(json.dumps(found)))
    ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
