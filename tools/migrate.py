"""Rewrites results of schema 1 in schema 2: ``python -m tools.migrate RESULTS``."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from rgbench.evaluate.results import Run, load_results, write_sheet, write_training_log, write_values


def migrate(root: Path) -> int:
    """Rewrite every result under a folder whose values lie in files of schema 1; the old files go.

    Returns:
        How many models and generations were rewritten.
    """
    found = [result for result in load_results(root) if list((result.folder or root).glob("*@*.json"))]
    for result in found:
        folder = result.folder
        assert folder is not None
        by_images: dict[tuple[int, tuple[tuple[str, int, str], ...]], list] = {}
        for value in result.values:
            rows = result.rows(*value.key)
            run = result.run_of[value.key]
            by_images.setdefault((run, rows.keys if rows else ()), []).append(
                replace(value, rows=None if rows is None else rows.values)
            )
        for (run, keys), values in by_images.items():
            write_values(root, result.head, result.runs[run], values, keys)
        last: Run = result.runs[-1]
        if images := result.images:
            write_sheet(folder, result.head, last, [(about, np.asarray(image)) for about, image in images.items()])
        if logged := result.training_log:
            write_training_log(folder, result.head, last, logged)
        for path in [*folder.glob("*@*.json"), *folder.glob("*@*.parquet"), folder / "training.json"]:
            path.unlink(missing_ok=True)
        shutil.rmtree(folder / "images", ignore_errors=True)
    return len(found)


if __name__ == "__main__":
    print(f"{migrate(Path(sys.argv[1]))} results rewritten")
