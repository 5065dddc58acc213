"""Folders of what can be computed again: out of git, safe to ask for at once, damaged files told and made again."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest

from rgbench.core.errors import UsageError
from rgbench.core.io import read_json
from rgbench.evaluate.images import Index
from rgbench.metrics.cache import cache_folder, keep_array, read_whole

WRITERS = 8


def test_many_may_ask_for_one_folder_at_once(tmp_path):
    with ThreadPoolExecutor(WRITERS) as pool:
        for turn in range(20):
            folder, gate = tmp_path / f"{turn}/deep", Barrier(WRITERS)
            assert list(pool.map(lambda _, f=folder, g=gate: (g.wait(), cache_folder(f))[1], range(WRITERS))) == [
                folder
            ] * (WRITERS)
            assert [path.name for path in folder.iterdir()] == [".gitignore"], "no temporary name is left"
            assert (folder / ".gitignore").read_text() == "*\n"


def test_many_may_keep_the_same_array_at_once(tmp_path):
    gate = Barrier(WRITERS)

    def keep(_):
        gate.wait()
        return keep_array(tmp_path, gate, {}, lambda: np.arange(4.0)).tolist()

    with ThreadPoolExecutor(WRITERS) as pool:
        assert list(pool.map(keep, range(WRITERS))) == [[0, 1, 2, 3]] * WRITERS
    assert len(list(tmp_path.iterdir())) == 2


def test_a_gitignore_of_ones_own_stays(tmp_path):
    (tmp_path / ".gitignore").write_text("*.tmp\n")
    assert cache_folder(tmp_path) == tmp_path
    assert (tmp_path / ".gitignore").read_text() == "*.tmp\n"


def test_damage_is_told_and_made_again(tmp_path, caplog):
    path = tmp_path / "a.json"
    assert read_whole(path, read_json) is None and not caplog.records, "no file is no damage"
    path.write_text("0")
    assert read_whole(path, read_json) == 0 and not caplog.records, "false is no damage"
    path.write_text("{")
    assert read_whole(path, read_json) is None
    assert str(path) in caplog.text and caplog.text.rstrip().endswith("; made again")


@pytest.mark.parametrize("text", ["3", "{}", "[3]", "[{}]"])
def test_a_foreign_index_of_kept_images_is_named(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(UsageError, match="index.json: not an index of images; remove it"):
        Index(tmp_path)
