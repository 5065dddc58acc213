"""Tables of growth, of metrics and of compilation say what their files say."""

from __future__ import annotations

import pytest

from tests.unit.test_bench_page import value, write
from tools.bench.page import page


def grown(method: str, at: int, seconds: float, flops: float) -> dict:
    return {"method": method, "over": "batch", "value": at, "seconds": value(seconds), "images_per_sec": at / seconds,
            "flops": flops, "share_of_matmul_rate": 0.5, "weights": "shipped", "proxy_parameters": 2e6}  # fmt: skip


def test_growth_is_told_from_the_first_value(tmp_path):
    rows = [grown("lcd", 8, 0.2, 1e9), grown("lcd", 32, 0.5, 4e9), grown("lrm", 8, 0.4, 3e9)]
    write(tmp_path, "growth-batch", what="growth", preset="benchtop", over="batch", overrides=[], rounds=3, rows=rows)
    text = page(tmp_path)
    assert "### With batch\n\nbenchtop, a CPU. `rgbench bench growth-batch` Weights: shipped.\n" in text
    assert "| lcd | 32 | 0.500 [0.450, 0.550] | 2.50 | 4.00 | 64.0 | 50 % |" in text
    assert "| lrm | 8 | 0.400 [0.360, 0.440] | 1.00 | 1.00 | 20.0 | 50 % |" in text
    assert "Growth with resolution, proxy was not measured" in text and "Growth with ranks was not measured" in text


def ranked(num: int, size: int, seconds: float, mean: float) -> dict:
    names = ("average", "largest", "gather_rows", "gather_lists")
    exchange = dict.fromkeys(names, value(0.0)) | {"average": value(mean), "largest": value(mean / 2)}
    return {"method": "lcd", "ranks": num, "batch_size": size, "threads_each": 1, "seconds": value(seconds),
            "images_per_sec": size / seconds, "gradient_bytes": 8e6, "exchange_sec": exchange,
            "all_reduce_alone_sec": value(0.012)}  # fmt: skip


def test_ranks_are_held_against_one(tmp_path):
    rows = [ranked(1, 32, 1.0, 0.0), ranked(2, 64, 1.25, 0.1)]
    write(tmp_path, "growth-ranks", what="growth", preset="benchtop", over="ranks", overrides=[], rounds=3, rows=rows)
    text = page(tmp_path)
    assert "| lcd | 1 | 32 | 1.000 | 32.0 | 100 % | – | – | – |" in text
    assert "| lcd | 2 | 64 | 1.250 | 51.2 | 80 % | 0.100 s, 8 % | 0.050 s, 4 % | 12.0 |" in text
    assert "(8.0 MB in lcd)" in text


def test_metrics_are_listed_heaviest_first(tmp_path):
    def costs(each: float) -> dict:
        return {"per_1000_sec": each, "finish_sec": 1.5, "load_sec": 0.5}

    together = {"metrics": ["hps", "fid"]} | costs(6.0)
    row = {"images": 512, "batch_size": 64, "resolution": 64, "generation_per_1000_sec": 10.0, "together": together,
           "alone": {"hps": costs(2.0), "fid": costs(5.0)}, "left_out": {"diversity": "too few"}}  # fmt: skip
    write(tmp_path, "metrics", what="metrics", preset="benchtop", rows=[row])
    text = page(tmp_path)
    lines = ["| fid | 5.00 | 0.50 | 1.50 | 0.5 |", "| hps | 2.00 | 0.20 | 1.50 | 0.5 |",
             "| **together** | 6.00 | 0.60 | 1.50 | 0.5 |"]  # fmt: skip
    assert "\n".join(lines) in text and "one pass of hps, fid" in text
    assert "\n- diversity was left out: too few.\n" in text


@pytest.mark.parametrize(("pays", "shown"), [(60.4, "60"), (None, "never")])
def test_compilation_says_when_it_pays(pays, shown, tmp_path):
    found = {"seconds": value(1.5), "gain": value(1.333), "compile_sec": 30.2, "steps_to_pay": pays,
             "gradient_difference": {"student": 1e-7, "proxy": 3e-6}}  # fmt: skip
    row = {
        "method": "lrm",
        "batch_size": 32,
        "dtype": "float32",
        "eager_sec": value(2.0),
        "rounding_difference": {"student": 2e-6, "proxy": 1e-7},
        "compiled": {"all": found},
    }
    write(tmp_path, "compile", what="compile", preset="benchtop", overrides=[], rounds=3, rows=[row])
    line = "| lrm | all | 2.000 [1.800, 2.200] | 1.500 [1.350, 1.650] | 1.33 [1.20, 1.47] | 30 | "
    assert f"{line}{shown} | 3e-06 | 2e-06 |" in page(tmp_path)
