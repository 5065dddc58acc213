"""Names in recipes and on the command line → the code behind them.

A closed table, plus entry points of installed plug-ins in the group ``rgbench.<table>``
(a name of ours cannot be taken over). Nothing is imported before it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from rgbench.core.errors import RgbenchError, UsageError, suggest

TABLES: dict[str, dict[str, str]] = {
    "trainer": {
        "lcd": "rgbench.train.lcd:LCD",
        "rg_lcd": "rgbench.train.rg_lcd:RGLCD",
        "lrm": "rgbench.train.lrm:LRM",
        "lrm_pretrain": "rgbench.train.pretrain:LRMPretrain",
    },
    "reward": {
        "aesthetic": "rgbench.rewards.aesthetic:AestheticReward",
        "clip_score": "rgbench.rewards.clip:CLIPScoreReward",
        "hps": "rgbench.rewards.clip:HPSReward",
        "pickscore": "rgbench.rewards.clip:PickScoreReward",
        "process": "rgbench.rewards.remote:ProcessReward",
        "sum": "rgbench.rewards.base:WeightedReward",
    },
    "metric": {
        "aesthetic": "rgbench.metrics.rewards:Aesthetic",
        "clip_score": "rgbench.metrics.rewards:CLIPScore",
        "cmmd": "rgbench.metrics.cmmd:CMMD",
        "fid": "rgbench.metrics.fid:FrechetDistance",
        "fid_inf": "rgbench.metrics.fid:FrechetInfinity",
        "hps": "rgbench.metrics.rewards:HPSScore",
        "hps_jpeg75": "rgbench.metrics.rewards:HPSThroughJPEG",
        "hpsv3": "rgbench.metrics.rewards:HPSv3",
        "imagereward": "rgbench.metrics.rewards:ImageReward",
        "kid": "rgbench.metrics.kid:KernelDistance",
        "oracle": "rgbench.metrics.oracle:OracleAccuracy",
        "pickscore": "rgbench.metrics.rewards:PickScore",
        "prdc": "rgbench.metrics.prdc:PrecisionRecall",
        "probes": "rgbench.metrics.probes.base:Probes",
        "vendi": "rgbench.metrics.vendi:VendiScore",
        "vqascore": "rgbench.metrics.rewards:VQAScore",
    },
    "probe": {
        "aliasing": "rgbench.metrics.probes.fragility:AliasingGain",
        "colour": "rgbench.metrics.probes.pixels:ColourDrift",
        "diversity": "rgbench.metrics.probes.diversity:Diversity",
        "fragility": "rgbench.metrics.probes.fragility:Fragility",
        "grid": "rgbench.metrics.probes.spectrum:GridPeaks",
        "pixels": "rgbench.metrics.probes.pixels:PixelStatistics",
        "spectrum": "rgbench.metrics.probes.spectrum:SpectrumProbe",
    },
    "data": {
        "scenes": "rgbench.data.sources:ScenesSource",
        "image_folder": "rgbench.data.sources:ImageFolderSource",
        "hf_dataset": "rgbench.data.sources:HFDatasetSource",
        "webdataset": "rgbench.data.tars:WebDatasetSource",
    },
}

# A probe is a metric too: both are found where a metric is asked for.
ALSO = {"metric": "probe"}


def names(table: str) -> list[str]:
    """Names in a table, plug-ins' included, sorted."""
    return sorted({*TABLES[table], *_plugins(table)})


def resolve(table: str, name: str) -> Any:
    """The object behind a name.

    Args:
        table: ``trainer``, ``reward``, ``metric`` (probes included), ``probe`` or ``data``.
        name: as recipes and the command line write it.

    Raises:
        UsageError: no such name; says the nearest.
        RgbenchError: a plug-in that cannot be imported.
    """
    if name in TABLES[table]:
        module, _, attribute = TABLES[table][name].partition(":")
        return getattr(import_module(module), attribute)
    plugins = _plugins(table)
    also = ALSO.get(table)
    others = names(also) if also else []
    if also and name not in plugins and name in others:
        return resolve(also, name)
    if name not in plugins:
        known = [*names(table), *others]
        raise UsageError(f"unknown {table} '{name[:80]}'; {suggest(name, known)}")
    try:
        return plugins[name].load()
    except (ImportError, AttributeError) as error:
        target = plugins[name].value
        raise RgbenchError(f"{table} '{name}': the plug-in {target} cannot be imported: {error}") from error


def _plugins(table: str) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=f"rgbench.{table}")}
