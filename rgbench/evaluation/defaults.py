"""What an evaluation measures where no metric is named: all that fit the model, the prompts and the weights at hand."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rgbench.errors import UsageError
from rgbench.metrics.contract import Accumulator, Context
from rgbench.metrics.judges import find_metric
from rgbench.registry import names

FOR_OWN_IMAGES = ("fid", "kid", "prdc", "vendi", "hps", "probes")
NAMED_ONLY = (
    "fid_inf",
    "hps_jpeg75",
    "cmmd",
    "clip_score",
    "pickscore",
    "aesthetic",
    "hpsv3",
    "imagereward",
    "vqascore",
)  # many images, or weights of their own

log = logging.getLogger(__name__)


def default_metrics(own_images: bool) -> list[str]:
    """Metrics that an evaluation takes when none is named.

    Args:
        own_images: it compares with the user's real images, for which no scenes are known.
    """
    return list(FOR_OWN_IMAGES) if own_images else [name for name in names("metric") if name not in NAMED_ONLY]


def named_metrics(wanted: Sequence[str], context: Context) -> list[tuple[str, Accumulator]]:
    """Metrics by name, ready for images.

    Args:
        wanted: names.
        context: of the evaluation.

    Raises:
        UsageError: one does not fit.
    """
    return [(name, find_metric(name, context.judges)(context)) for name in wanted]


def fitting_metrics(wanted: Sequence[str], context: Context) -> list[tuple[str, Accumulator]]:
    """Those of some metrics that fit; what does not is told with its reason.

    Args:
        wanted: names.
        context: of the evaluation.

    Raises:
        UsageError: none fits.
    """
    made: list[tuple[str, Accumulator]] = []
    left_out: dict[str, list[str]] = {}
    for name in wanted:
        try:
            made += named_metrics([name], context)
        except UsageError as error:
            left_out.setdefault(str(error).removeprefix(f"metric {name}: "), []).append(name)
    for reason, of in left_out.items():
        log.warning("left out: %s: %s", ", ".join(of), reason)
    if not made:
        raise UsageError(f"none of the metrics {', '.join(wanted)} fits; name one with --metric")
    return made
