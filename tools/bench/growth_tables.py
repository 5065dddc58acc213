"""Tables of how cost grows: with the batch, the resolution, the proxy, the ranks, and by metric of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tools.bench.document import DOES_NOT_FIT, fitting

Results = dict[str, dict[str, Any]]

NONE = ("–",)  # a cell without a figure
UNITS = {"batch": "images of a step", "resolution": "px", "proxy": "layers of the proxy's image tower"}


def table(heads: Sequence[str], body: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, the first column left, the others right.

    Raises:
        ValueError: a line without a cell for each head.
    """
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *body]
    for line in lines:
        if len(line) != len(heads):
            raise ValueError(f"{len(line)} cells under {len(heads)} heads: {line}")
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def of_kind(found: Results, what: str) -> list[dict[str, Any]]:
    """Results of one kind, by file name."""
    return [content for _, content in sorted(found.items()) if content.get("what") == what]


def machine_of(content: dict[str, Any]) -> str:
    """Where it was measured, and by which command."""
    machine = content["machine"]
    return f"{content['preset']}, {machine['device']}. `{content['command']}`"


def dimensions(found: Results) -> str:
    """Each dimension that was measured; which were not."""
    text, absent = [], []
    for over, unit in UNITS.items():
        measured = [content for content in of_kind(found, "growth") if content["over"] == over]
        text += [_dimension(content, over, unit) for content in measured]
        absent += [] if measured else [over]
    if absent:
        text.append(f"Growth with {', '.join(absent)} was not measured (`python -m tools.bench growth`).\n")
    return "\n".join(text)


def _dimension(content: dict[str, Any], over: str, unit: str) -> str:
    first: dict[str, dict[str, Any]] = {}
    body = []
    for row in content["rows"]:
        if DOES_NOT_FIT in row:
            body.append((row["method"], row["value"], "does not fit", *NONE * 4))
            continue
        base = first.setdefault(row["method"], row)
        seconds = row["seconds"]
        body.append((
            row["method"], row["value"], f"{seconds['median']:.3f} [{seconds['low']:.3f}, {seconds['high']:.3f}]",
            f"{seconds['median'] / base['seconds']['median']:.2f}", f"{row['flops'] / base['flops']:.2f}",
            f"{row['images_per_sec']:.1f}", f"{100 * row['share_of_matmul_rate']:.0f} %",
        ))  # fmt: skip
    heads = ("method", unit, "seconds", "× first", "FLOPs × first", "images/s", "of matmul rate")
    measured = fitting(content["rows"])
    weights = f" Weights: {measured[0]['weights']}." if measured else ""
    proxy = ""
    if over == "proxy":
        sizes = ", ".join(f"{row['value']} layers {row['proxy_parameters'] / 1e6:.1f} M" for row in measured)
        proxy = f" Parameters with the text tower: {sizes}."
    return f"### With {over}\n\n{machine_of(content)}{weights}{proxy}\n\n{table(heads, body)}"


def ranks(found: Results) -> str:
    """One rank against two, and what of a step is exchange."""
    text = []
    for content in (content for content in of_kind(found, "growth") if content["over"] == "ranks"):
        alone = {row["method"]: row for row in content["rows"] if row["ranks"] == 1}
        body = []
        for row in content["rows"]:
            seconds, exchange = row["seconds"]["median"], row["exchange_sec"]
            others = sum(value["median"] for name, value in exchange.items() if name != "average")
            rate = row["images_per_sec"] / alone[row["method"]]["images_per_sec"] / row["ranks"]
            body.append((
                row["method"], row["ranks"], row["batch_size"], f"{seconds:.3f}", f"{row['images_per_sec']:.1f}",
                f"{100 * rate:.0f} %", _share(exchange["average"]["median"], seconds), _share(others, seconds),
                "–" if row["ranks"] == 1 else f"{1e3 * row['all_reduce_alone_sec']['median']:.1f}",
            ))  # fmt: skip
        heads = ("method", "ranks", "images of a step", "seconds", "images/s", "of ranks × one rank's",
                 "mean of gradients", "other exchanges", "mean alone (ms)")  # fmt: skip
        each = content["rows"][-1]
        text.append(
            f"### With ranks\n\n{machine_of(content)} One thread a rank, gradients over gloo within the machine "
            f"({each['gradient_bytes'] / 1e6:.1f} MB in {each['method']}). Exchanges hold the waiting for the slower "
            "rank; the mean alone is of gradients that are there already.\n\n" + table(heads, body)
        )
    return "\n".join(text) or "Growth with ranks was not measured (`python -m tools.bench growth ranks`).\n"


def _share(part: float, whole: float) -> str:
    return "–" if part == 0 else f"{part:.3f} s, {100 * part / whole:.0f} %"


def metrics(content: dict[str, Any]) -> str:
    """What each metric costs; the body of its section."""
    row = content["rows"][0]
    making, together = row["generation_per_1000_sec"], row["together"]
    body = [_costs(name, costs, making) for name, costs in _heaviest(row["alone"])]
    body.append(_costs("**together**", together, making))
    heads = ("metric", "1,000 images (s)", "× generation", "its figures (s)", "loading (s)")
    return (
        f"Each metric alone sees the same {row['images']} images of {row['resolution']} px, in batches of "
        f"{row['batch_size']}; generation takes {making:.1f} s for 1,000. Figures are made once, from all "
        f"{row['images']} images; features of the reference are there already. Together is one pass of "
        f"{', '.join(together['metrics'])}, which share decoded images and features.\n\n"
        + table(heads, body)
        + "".join(f"\n- {name} was left out: {reason}.\n" for name, reason in row["left_out"].items())
    )


def _heaviest(alone: dict[str, dict[str, float]]) -> list[tuple[str, dict[str, float]]]:
    return sorted(alone.items(), key=lambda item: -item[1]["per_1000_sec"])


def _costs(name: str, costs: dict[str, float], making: float) -> tuple[str, ...]:
    each = costs["per_1000_sec"]
    return (name, f"{each:.2f}", f"{each / making:.2f}", f"{costs['finish_sec']:.2f}", f"{costs['load_sec']:.1f}")
