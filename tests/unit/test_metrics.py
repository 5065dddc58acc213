"""The contract of all metrics: names and infos on the class, planned values, states that merge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from rgbench.benchtop.scenes import scene_batch
from rgbench.core import registry
from rgbench.core.errors import UsageError
from rgbench.core.registry import TABLES, resolve
from rgbench.data.prompts import benchtop_prompts
from rgbench.metrics import values
from rgbench.metrics.base import Metric
from rgbench.metrics.features import FeatureSet
from rgbench.metrics.networks import EffLite0Network
from rgbench.metrics.probes.base import PerImageProbe
from rgbench.metrics.reference import ReferenceFolder, from_uint8, to_uint8
from rgbench.metrics.values import PEOPLE, Direction, Family, MetricInfo, metric_info, shipped_infos
from tests.tiny_models import make_context

NAMES = [(table, name) for table in ("metric", "probe") for name in TABLES[table]]
NUM = 24


@pytest.fixture
def context(tmp_path):
    return make_context(benchtop_prompts(3).with_seeds(range(8)), tmp_path)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return from_uint8(to_uint8(scene_batch("all", range(NUM))[0]))


def test_metrics_say_everything_about_themselves():
    kinds = {name: resolve(table, name) for table, name in NAMES}
    for name, kind in kinds.items():
        assert issubclass(kind, Metric) and kind.name == name, name
        assert kind.infos or name == "probes", name
    infos = [info for kind in kinds.values() for info in kind.infos]
    assert len({info.name for info in infos}) == len(infos) == len(shipped_infos()) - len(PEOPLE)
    assert all(info.about and "\n" not in info.about and len(info.about) < 100 for info in (*infos, *PEOPLE))
    default = {name for name in TABLES["metric"] if kinds[name].default}
    assert default == {"fid", "gold_utility", "gold_win_rate", "hps", "kid", "oracle", "prdc", "probes", "vendi"}
    assert all(kinds[name].default for name in TABLES["probe"])


def test_infos_are_looked_up_by_name(monkeypatch, caplog):
    assert metric_info("hfer_db").label == "HFER" and metric_info("kid").label == "KID ×1000"
    mine = MetricInfo(
        name="mine", label="Mine", about="", unit="", direction=Direction.LOWER, family=Family.PIXELS, decimals=1
    )
    assert metric_info("mine", {"mine": mine}) is mine
    assert metric_info("hps", {"hps": mine}).label == "HPS", "no result renames a metric of ours"
    neutral = metric_info("mine")
    assert neutral.label == "mine" and neutral.direction is Direction.HIGHER

    class Entry:
        name = "broken"

        def __init__(self, value):
            self.value = value

        def load(self):
            if self.value is None:
                raise ImportError("no such module")
            return self.value

    found = {"mine": Entry(type("Mine", (), {"infos": (mine,)})), "broken": Entry(None)}
    monkeypatch.setattr(registry, "_plugins", lambda table: found if table == "probe" else {})
    values._plugin_infos.cache_clear()
    try:
        assert metric_info("mine") is mine and "probe broken: its infos cannot be read" in caplog.text
    finally:
        values._plugin_infos.cache_clear()


@pytest.mark.parametrize("name", ["fid", "kid", "prdc", "vendi", "hps", "hps_jpeg75", "oracle", "diversity", "probes"])
def test_states_merge_to_the_values_of_one_pass(context, images, name):
    """Two metrics that saw a half each, merged in another order, give the values of one that saw all."""
    prompts, halves = context.prompts.prompts, (np.arange(0, NUM, 2), np.arange(1, NUM, 2))

    def seen(*parts: np.ndarray) -> Metric:
        metric = resolve("metric", name)(context)
        for at in parts:
            metric.update(images[at], [prompts[i] for i in at], at)
        return metric

    whole, merged = seen(*halves), resolve("metric", name)(context)
    assert merged.mergeable
    for at in reversed(halves):
        merged.merge_state(at, seen(at).state_dict(at))
    for one, other in zip(whole.compute(), merged.compute(), strict=True):
        rounding = 1e-9 if name == "probes" else 0  # sums of power add up in another order
        assert other.value == pytest.approx(one.value, rel=rounding, abs=rounding), one.metric
        if one.interval:
            assert other.interval.low == pytest.approx(one.interval.low, rel=rounding, abs=rounding), one.metric
        assert one.rows is None or np.array_equal(one.rows, other.rows), one.metric
    names = [value.metric for value in merged.compute()]
    assert names == [metric for metric, _ in whole.planned]
    assert set(names) <= {info.name for info in whole.infos}


def test_a_metric_that_declares_no_state_cannot_be_shared(context):
    class Plain(Metric):
        name = "plain"
        infos = ()
        planned = ()

        def update(self, images, prompts, positions): ...

        def compute(self):
            return []

    class Whole(Plain):
        parts = ("inside",)

        def __init__(self, context):
            super().__init__(context)
            self.inside = [Plain(context), resolve("probe", "pixels")(context)]

    assert not Plain(context).mergeable and not Whole(context).mergeable
    assert issubclass(resolve("probe", "pixels"), PerImageProbe) and resolve("probe", "pixels")(context).mergeable


@pytest.mark.parametrize("name", ["fid", "fid_inf", "kid", "prdc", "vendi"])
def test_set_distances_of_two_image_sizes_are_two_columns(tmp_path, images, name):
    """But for named protocols that resize both sides to one size."""
    for i, pixels in enumerate(images[:8].mul(255).byte().permute(0, 2, 3, 1).numpy()):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    features = FeatureSet(ReferenceFolder(tmp_path, tmp_path), EffLite0Network(torch.device("cpu")))

    def ids(named: str) -> set[str]:
        given = {"features": features, "named": named}
        contexts = [make_context(benchtop_prompts(8), tmp_path, resolution=side, **given) for side in (64, 512)]
        return {resolve("metric", name)(context).planned[0][1].id for context in contexts}

    assert len(ids("folder")) == 2 and len(ids("coco14-30k")) == 1
    with pytest.raises(UsageError, match=f"metric {name}: the real scenes are 64 px, these images 512 px"):
        resolve("metric", name)(make_context(benchtop_prompts(8), tmp_path, resolution=512))
