"""The other benchmarks at tiny sizes: each compares like with like, and says what it found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from rgbench.cli.main import app
from rgbench.data.config import WebDatasetData
from rgbench.data.sources import open_source
from tests.unit.test_bench_parts import CPU, TINY, subject
from tools.bench import data, evaluation, fid, generate, levers, start
from tools.bench.clock import Clock
from tools.bench.neighbour import Neighbour, beside
from tools.bench.random_models import random_models


def test_each_lever_is_measured(tmp_path):
    found = subject("lrm", tmp_path)
    names = list(levers.LEVERS)
    rows = levers.measure(found, names, rounds=1)
    json.dumps(rows, allow_nan=False)
    assert [row["lever"] for row in rows] == names
    assert all(row["gain"]["median"] > 0 and row["with_sec"]["num"] == 1 for row in rows)
    assert not any(p.grad is not None for p in found.trainer.student.parameters())


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the state of a process from /proc")
def test_the_neighbour_runs_only_while_it_is_awake():
    def state() -> str:
        return Path(f"/proc/{neighbour._process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]

    with Neighbour() as neighbour:
        process = neighbour._process
        assert state() == "T"
        neighbour.wake()
        assert state() != "T"
        neighbour.pause()
    assert process.poll() is not None


def test_work_is_timed_alone_and_beside_it():
    calls: list[int] = []
    found = beside(lambda: calls.append(sum(range(1000))), 2, Clock(CPU))
    assert len(calls) == 1 + 2 * 2 and found["times_idle"]["num"] == 2 and found["busy_sec"]["median"] > 0


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    return generate.untrained_student(random_models(TINY, CPU))


def test_both_samplers_give_the_same_images(student):
    row = generate.measure(student, batch_size=2, steps=4, guidance=5.0, rounds=1)
    assert row["difference"]["share_within_2_of_255"] == 1.0 and row["difference"]["largest"] < 1e-4
    assert row["difference"]["psnr_db"] > 60 and row["images_per_sec"]["plain"] > 0


def test_differences_are_seen():
    a = torch.zeros(1, 3, 2, 2)
    b = a.clone()
    b[0, 0, 0, 0] = 0.5
    found = generate.differences(a, b)
    assert found["largest"] == 0.5 and found["share_within_2_of_255"] == pytest.approx(11 / 12)
    assert found["psnr_db"] == pytest.approx(-10 * np.log10(0.25 / 12))


def test_plain_decoding_does_what_the_loader_does(tmp_path):
    files = data.write_tar(tmp_path / "00000.tar", 3, 96, 80)
    source = open_source(WebDatasetData(path=str(tmp_path), resolution=32))
    images = source.load([0, 1, 2]).images_BCHW.permute(0, 2, 3, 1).numpy()
    for file, image in zip(files, images, strict=True):
        assert np.array_equal(data.plain_decode(file, 32), image)


def test_the_command_writes_what_it_measured(tmp_path):
    words = ["bench", "data", "--num", "32", "--width", "48", "--height", "40", "--resolution", "32", "--rounds", "1"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    kept = json.loads((tmp_path / "data-webdataset-cpu.json").read_text())
    row = kept["rows"][0]
    assert kept["schema_version"] == 1 and kept["what"] == "data" and "versions" in kept["machine"]
    expected = row["images_per_sec"]["rgbench"] / row["images_per_sec"]["plain"] / row["cores"]
    assert row["share_of_plain_times_cores"] == pytest.approx(expected)


def test_the_distance_is_clean_fids():
    row = fid.solve(24, 64, rounds=1)
    assert row["relative_difference"] < 1e-6 and row["seconds"]["eigvalsh twice"]["median"] > 0


def test_moments_take_the_same_memory_for_twice_the_samples():
    four, eight = fid.memory(16, chunks=(2, 4)).values()
    assert 0 < eight <= 1.05 * four


@pytest.mark.long
def test_features_are_clean_fids(tmp_path):
    row = fid.end_to_end(tmp_path, num=3, side=64, device="cpu", rounds=1)
    assert row["largest_relative_difference"] < 1e-4


@pytest.mark.long
def test_an_evaluation_is_split(tmp_path):
    row = evaluation.measure(tmp_path, num=4, metrics=["hps", "oracle"], device="cpu", rounds=1)
    assert 0 < row["share_outside_generation"] < 1 and row["times_generation"] > 1 and len(row["rounds"]) == 2


@pytest.mark.long
def test_start_up_is_timed(tmp_path):
    row = start.measure(tmp_path, "cpu", rounds=1)
    assert 0 < row["help_cpu_sec"]["median"] < row["train_to_first_step_sec"]["median"]
