"""The cost of a run: what all ranks spent, over all interruptions."""

import pytest

from rgbench.train.log import CostMeter, merge_costs


def test_times_add_up_over_ranks_and_peaks_do_not():
    one = {"wall_sec": 9.0, "cpu_sec": 4.0, "gpu_sec": 9.0, "peak_rss_gib": 2.0, "peak_gpu_gib": 7.0, "images": 8}
    two = one | {"wall_sec": 8.0, "cpu_sec": 3.5, "gpu_sec": 8.5, "peak_rss_gib": 3.0, "peak_gpu_gib": 6.0}
    assert merge_costs([one, two]) == one | {"cpu_sec": 7.5, "gpu_sec": 17.5, "peak_rss_gib": 3.0}


def test_gpu_time_is_kept_by_a_run_that_goes_on_without_one_and_absent_where_there_never_was_one():
    fresh, going_on = CostMeter().read(), CostMeter({"gpu_sec": 60.0, "peak_gpu_gib": 7.0, "wall_sec": 61.0}).read()
    assert not {"gpu_sec", "peak_gpu_gib"} & fresh.keys()
    assert (going_on["gpu_sec"], going_on["peak_gpu_gib"]) == (60.0, 7.0)
    assert CostMeter({}, "cpu").read().keys() == fresh.keys(), "whatever else in this process used a GPU"
    assert going_on["wall_sec"] == pytest.approx(61, abs=1)
    assert merge_costs([going_on, fresh])["gpu_sec"] == 60.0
