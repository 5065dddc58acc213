"""A run's log kept beside its results: thinned, without loss of what was logged rarely."""

import json

import pytest

from rgbench.core.errors import UsageError
from rgbench.core.run import RunDirectory
from rgbench.evaluate.results import FILE, keep_log, load_log, thin


def test_means_of_blocks_at_their_last_step():
    rows = [{"step": step, "loss": float(step), **({"rare": 7.0} if step == 3 else {})} for step in range(1, 8)]
    assert thin(rows, 3) == [
        {"step": 3, "loss": 2.0, "rare": 7.0},
        {"step": 6, "loss": 5.0},
        {"step": 7, "loss": 7.0},
    ]
    assert thin(rows, 7) == rows and thin([], 5) == []
    assert len(thin([{"step": i} for i in range(1001)], 200)) <= 200


def test_a_runs_log_is_kept_and_read_again(tmp_path):
    run = RunDirectory(tmp_path / "run").create({"seed": 0}, {"name": "run"})
    for step in (1, 2):
        run.log({"step": step, "reward": step / 2})
    (tmp_path / "results").mkdir()
    keep_log(run.path, tmp_path / "results")
    assert load_log(tmp_path / "results") == [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 1.0}]
    file = tmp_path / "results" / FILE
    stamp = file.stat().st_mtime_ns
    keep_log(run.path, tmp_path / "results")
    assert file.stat().st_mtime_ns == stamp, "the same again is not written again"
    for other in ("{", '{"schema_version": 1, "rows": []}'):
        file.write_text(other)
        keep_log(run.path, tmp_path / "results")
        assert len(load_log(tmp_path / "results")) == 2


def test_no_log_leaves_nothing(tmp_path):
    run = RunDirectory(tmp_path / "run").create({"seed": 0}, {"name": "run"})
    keep_log(run.path, tmp_path)
    assert not (tmp_path / FILE).exists() and load_log(tmp_path) == []


@pytest.mark.parametrize(
    "content",
    [[], {"schema_version": 2, "rows": []}, {"schema_version": 1}, {"schema_version": 1, "rows": [{"reward": 1.0}]},
     {"schema_version": 1, "rows": [{"step": 1, "reward": "high"}]}],
)  # fmt: skip
def test_other_files_are_refused_by_name(tmp_path, content):
    (tmp_path / FILE).write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"training\.json: .*evaluate the run again"):
        load_log(tmp_path)
