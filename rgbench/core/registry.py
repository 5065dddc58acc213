"""Tables from names in recipes and on the command line to the code behind them.

A closed table, plus entry points of installed plug-ins in the group ``rgbench.<table>``, which cannot take over a name
of ours. Nothing is imported before its name is resolved.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rgbench.core.errors import RgbenchError, UsageError, suggest

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

TABLES: dict[str, dict[str, str]] = {
    "trainer": {
        "lcd": "rgbench.train.lcd:LCD",
        "rg_lcd": "rgbench.train.rg_lcd:RGLCD",
        "lrm": "rgbench.train.lrm:LRM",
        "lrm_pretrain": "rgbench.train.pretrain:LRMPretrain",
        "tcd": "rgbench.train.tcd:TCD",
        "rg_tcd": "rgbench.train.guided:RGTCD",
        "lrm_tcd": "rgbench.train.guided:LRMTCD",
        "mlcm": "rgbench.train.mlcm:MLCM",
        "weighted": "rgbench.train.weighted:Weighted",
        "vsd": "rgbench.train.vsd:VSD",
        "dollar": "rgbench.train.dollar:Dollar",
        "rg_mlcm": "rgbench.train.guided:RGMLCM",
        "lrm_mlcm": "rgbench.train.guided:LRMMLCM",
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
        "gold_utility": "rgbench.metrics.gold:GoldUtility",
        "gold_win_rate": "rgbench.metrics.gold_win_rate:GoldWinRate",
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
        "teacher": "rgbench.data.latents:TeacherSource",
    },
}

ALSO = {"metric": "probe"}  # a probe is a metric too


def names(table: str) -> list[str]:
    """List the names of a table with those of plug-ins, sorted."""
    return sorted({*TABLES[table], *_plugins(table)})


def resolve(table: str, name: str) -> Any:
    """Import the object behind a name.

    Args:
        table: ``trainer``, ``reward``, ``metric`` (probes included), ``probe`` or ``data``.
        name: as recipes and the command line write it.

    Raises:
        UsageError: no such name; names the nearest.
        RgbenchError: a plug-in that cannot be imported.
    """
    tables = [table, ALSO[table]] if table in ALSO else [table]
    for own, plugins in ((TABLES[each], _plugins(each)) for each in tables):
        if name in own:
            module, _, attribute = own[name].partition(":")
            return getattr(import_module(module), attribute)
        if name in plugins:
            return _load(table, plugins[name])
    known = [known for each in tables for known in names(each)]
    raise UsageError(f"unknown {table} '{name[:80]}'; {suggest(name, known)}")


def _plugins(table: str) -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points  # slow to import, and not needed for --help

    return {entry.name: entry for entry in entry_points(group=f"rgbench.{table}")}


def _load(table: str, plugin: EntryPoint) -> Any:
    try:
        return plugin.load()
    except (ImportError, AttributeError) as error:
        raise RgbenchError(
            f"{table} '{plugin.name}': the plug-in {plugin.value} cannot be imported: {error}"
        ) from error
