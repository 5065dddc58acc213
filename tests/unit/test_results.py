"""The result store: round trip, durability, damage, old and newer files, concurrent writers."""

from __future__ import annotations

import fcntl
import itertools
import json
import multiprocessing
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rgbench.core.errors import UsageError
from rgbench.core.io import canonical_sha256
from rgbench.evaluate import results as store
from rgbench.evaluate.results import (
    MAX_SHEET_PIXELS,
    PARTIAL,
    RESULT,
    SAMPLES,
    SHEET,
    TRAINING,
    DamagedResult,
    Generation,
    Head,
    NewerResult,
    Run,
    SheetImage,
    fold,
    load_result,
    load_results,
    remove_folder,
    stored_keys,
    thin,
    write_sheet,
    write_training_log,
    write_values,
)
from rgbench.metrics.values import Interval, MetricValue, Protocol
from tests.fork_server import never_wait_for_the_disk
from tests.results_maker import make_result
from tools.migrate import migrate

HISTORY = Path(__file__).parent.parent / "history"
HEAD = Head(
    world="benchtop",
    model="lrm-s0",
    method="lrm",
    generation=Generation.of("lcm4", {"sampler": "lcm", "steps": 4, "guidance_scale": 5.0, "weights_sha256": "0" * 64}),
    training_seed=0,
    recipe_sha256="ab" * 32,
    training={"step": 250, "steps": 250},
    cost={"nfe": 4, "train_wall_sec": None},
)
RUN = Run(command="rgbench eval lrm-s0", provenance={"git": None, "threads": 1})
KEYS = (("test/0", 0, "test"), ("test/1", 0, "test"))
LOG = [{"step": step, "loss": float(step), **({"rare": 7.0} if step == 3 else {})} for step in range(1, 8)]


def protocol(metric: str, **fields) -> Protocol:
    return Protocol.of(metric, {"prompts": {"name": "benchtop", "sha256": "1" * 64, "num": 2}, **fields})


def value(metric: str = "hps", number: float | None = 1.75, rows: list[float] | None = None, **fields) -> MetricValue:
    given = {"interval": Interval(low=1.0, high=2.5, level=0.95, method="bootstrap"), "num_images": 2}
    given |= {"flags": ("n<=d",), "extra": {"groups": {"test": 1.75}}, "protocol": protocol(metric)}
    return MetricValue(
        metric=metric, value=number, rows=None if rows is None else np.array(rows), **{**given, **fields}
    )


def put(root: Path, *values: MetricValue, head: Head = HEAD, run: Run = RUN) -> Path:
    return write_values(root, head, run, values, KEYS)


def images(num: int, side: int = 8) -> list[tuple[SheetImage, np.ndarray]]:
    about = [SheetImage(prompt_id=f"test/{i}", prompt="a red circle", seed=0, noise_seed=i) for i in range(num)]
    return [
        (a, np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)) for i, a in enumerate(about)
    ]


def whole(root: Path) -> Path:
    """A result with everything that one may have."""
    folder = put(root, value(rows=[1.0, 2.5]), value("oracle_all", 50.0, [0.0, 100.0]), value("kd_efflite0", 3.0))
    write_sheet(folder, HEAD, RUN, images(5))
    write_training_log(folder, HEAD, RUN, LOG)
    return folder


def test_round_trip(tmp_path):
    folder = whole(tmp_path)
    assert folder == tmp_path / "benchtop" / "lrm-s0" / HEAD.generation.id
    assert {path.name for path in folder.iterdir()} == {RESULT, SAMPLES, TRAINING, SHEET, PARTIAL}
    assert not list((folder / PARTIAL).iterdir())
    assert next(iter(json.loads((folder / RESULT).read_text()))) == "schema_version"
    (found,) = load_results(tmp_path)
    assert found.head == HEAD and found.runs == (RUN,) and not found.is_checkpoint and found.folder == folder
    assert [v.metric for v in found.values] == ["hps", "kd_efflite0", "oracle_all"]
    stored = found.by_key[value().key]
    assert replace(stored, rows_sha256=None) == value()
    assert found.rows(*value().key).by_image() == {("test/0", 0): 1.0, ("test/1", 0): 2.5}
    assert found.rows(*value("kd_efflite0").key) is None
    assert list(found.images) == [about for about, _ in images(5)]
    assert all(np.array_equal(np.asarray(a), b) for a, (_, b) in zip(found.images.values(), images(5), strict=True))
    assert found.training_log == LOG and stored_keys(folder) == set(found.by_key)


def test_an_undefined_value_is_null_and_not_zero(tmp_path):
    put(tmp_path, value(number=None, interval=None))
    assert load_results(tmp_path)[0].values[0].value is None


def test_a_later_value_of_a_key_replaces_the_earlier(tmp_path):
    put(tmp_path, value(rows=[1.0, 2.5]))
    other = Run(command="rgbench eval lrm-s0 --force")
    folder = put(tmp_path, value(number=2.0, rows=[1.5, 2.5]), value("fragility", 1.0), run=other)
    found = load_result(folder)
    assert found.by_key[value().key].value == 2.0 and found.runs == (other,)
    assert found.rows(*value().key).values.tolist() == [1.5, 2.5]


def test_images_of_several_prompt_lists_share_one_table(tmp_path):
    put(tmp_path, value(rows=[1.0, 2.5]))
    keys = (("mine/0", 0, ""), ("test/1", 0, "test"), ("mine/0", 3, ""))
    other = value("oracle_all", 2.0, [1.0, 2.0, 3.0])
    folder = write_values(tmp_path, HEAD, RUN, [other], keys)
    found = load_result(folder)
    assert found.rows(*other.key).by_image() == {("mine/0", 0): 1.0, ("test/1", 0): 2.0, ("mine/0", 3): 3.0}
    assert found.rows(*value().key).by_image() == {("test/0", 0): 1.0, ("test/1", 0): 2.5}


def test_vectors_that_the_values_of_a_protocol_share_are_stored_once(tmp_path):
    shared, power = protocol("spectrum"), list(range(1000))
    both = [value(name, 1.0, protocol=shared, extra={"power": power, "own": name}) for name in ("hfer_db", "slope")]
    folder = put(tmp_path, *both)
    assert (folder / RESULT).read_text().count("998, 999") == 1
    assert [v.extra for v in load_result(folder).values] == [{"power": power, "own": n} for n in ("hfer_db", "slope")]


def test_ids_follow_the_fields_and_not_their_order():
    assert Generation.of("lcm4", {"a": 1, "b": [2]}) == Generation.of("lcm4", {"b": [2], "a": 1})
    assert Generation.of("lcm4", {"a": 1}).id == "lcm4-015abd7f", "ids name folders: they must never change"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_written(tmp_path, bad):
    for broken in (
        value(number=bad, interval=None),
        value(rows=[1.0, bad]),
        value(extra={"power": [1.0, bad]}, rows=[1.0, 2.0]),
        value(protocol=protocol("hps").model_copy(update={"fields": {"x": {"y": bad}}})),
    ):
        with pytest.raises(ValueError, match="finite|not stored|compliant"):
            put(tmp_path, broken)
    with pytest.raises(ValueError, match="rows of shape"):
        put(tmp_path, value(rows=[1.0]))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../../evil", "a\\b", "a\0b"])
def test_names_cannot_lead_out_of_the_results(tmp_path, name):
    for field in ("world", "model"):
        with pytest.raises(ValueError, match="cannot name a folder"):
            Head(**{**HEAD.model_dump(), field: name})
    with pytest.raises(ValueError, match="cannot name a folder"):
        Generation(id=name, fields={})


# Damage


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(bytes(data))


def read_everything(folder: Path) -> list:
    found = load_result(folder)
    rows = [found.rows(*v.key) for v in found.values]
    numbers = [(v.key, v.value, v.interval, v.extra, None if r is None else r.by_image())
               for v, r in zip(found.values, rows, strict=True)]  # fmt: skip
    pixels = [(about, image.tobytes()) for about, image in found.images.items()]
    return [found.head, found.runs, numbers, found.training_log, pixels]


@pytest.mark.parametrize("name", [RESULT, SAMPLES, TRAINING, SHEET])
def test_flipped_bits_are_found_or_without_effect(tmp_path, name):
    folder = whole(tmp_path)
    good, path = read_everything(folder), folder / name
    data = path.read_bytes()
    found = 0
    for offset in np.random.default_rng(0).integers(0, len(data), 60):
        flip(path, int(offset))
        try:
            assert read_everything(folder) == good, offset
        except DamagedResult as error:
            found += 1
            assert str(path) in str(error)
        path.write_bytes(data)
    assert found > (20 if name == SAMPLES else 55), "a flip in a name or an offset that nobody reads has no effect"


def test_a_whole_file_with_another_kind_of_field_counts_as_damaged(tmp_path):
    path = whole(tmp_path) / RESULT
    content = json.loads(path.read_text())
    del content["sha256"]
    content["model"] = 7
    path.write_text(json.dumps({**content, "sha256": canonical_sha256(content)}))
    with pytest.raises(DamagedResult, match=r"result\.json: not a result: model: .*remove it and run"):
        load_results(tmp_path)


def test_a_damaged_result_is_kept_aside_and_measured_again(tmp_path, caplog):
    folder = whole(tmp_path)
    damaged = (folder / RESULT).read_text().replace("1.75", "1.85", 1)
    (folder / RESULT).write_text(damaged)
    with pytest.raises(DamagedResult, match=r"result\.json: its sha256 does not match"):
        load_results(tmp_path)
    assert stored_keys(folder) == set() and "measured again" in caplog.text
    whole(tmp_path)
    assert len(load_result(folder).values) == 3
    assert (folder / f"{RESULT}.damaged").read_text() == damaged


def test_damaged_rows_are_measured_again_and_the_others_stay(tmp_path, caplog):
    folder = whole(tmp_path)
    (folder / SAMPLES).write_bytes((folder / SAMPLES).read_bytes()[:40])
    with pytest.raises(DamagedResult, match=r"samples\.parquet"):
        load_result(folder).rows(*value().key)
    assert stored_keys(folder) == {value("kd_efflite0").key} and "measured again" in caplog.text
    put(tmp_path, value(rows=[1.0, 2.5]), value("oracle_all", 50.0, [0.0, 100.0]))
    assert len(stored_keys(folder)) == 3
    (folder / SAMPLES).unlink()
    with pytest.raises(DamagedResult, match=r"samples\.parquet"):
        load_result(folder).rows(*value().key)


def test_a_damaged_part_does_not_stop_the_others(tmp_path, caplog):
    folder = whole(tmp_path)
    part = folder / PARTIAL / "00000000000000000001-a.json"
    part.write_text("{")
    with pytest.raises(DamagedResult, match=r"00001-a\.json"):
        load_result(folder)
    assert len(stored_keys(folder)) == 3
    put(tmp_path, value("fragility", 1.0))
    assert len(load_result(folder).values) == 4 and not part.exists() and "kept as" in caplog.text


@pytest.mark.parametrize("name", [TRAINING, SHEET])
def test_a_damaged_log_or_sheet_is_written_again(tmp_path, name):
    folder = whole(tmp_path)
    good = (folder / name).read_bytes()
    flip(folder / name, len(good) // 2)
    whole(tmp_path)
    assert (folder / name).read_bytes() == good


# Other versions and other files


@pytest.mark.parametrize("place", [RESULT, f"{PARTIAL}/00000000000000000001-a.json"])
def test_a_newer_result_is_never_overwritten(tmp_path, place):
    folder = whole(tmp_path)
    newer = '{"schema_version": 3, "surprise": [1]}'
    (folder / place).write_text(newer)
    for act in (lambda: load_results(tmp_path), lambda: stored_keys(folder), lambda: put(tmp_path, value())):
        with pytest.raises(NewerResult, match="schema version 3.*update rgbench"):
            act()
    assert (folder / place).read_text() == newer


@pytest.mark.parametrize("text", ["", "[]", '{"schema_version": 2, "value": NaN}', '{"schema_version": 2', "{}"])
def test_files_that_are_no_results_are_named(tmp_path, text):
    path = whole(tmp_path) / RESULT
    path.write_text(text)
    with pytest.raises(DamagedResult, match=r"result\.json: .*remove it and run rgbench eval again"):
        load_results(tmp_path)


def test_a_copy_under_another_name_is_refused(tmp_path):
    folder = whole(tmp_path)
    shutil.copytree(folder.parent, tmp_path / "benchtop" / "copy")
    with pytest.raises(UsageError, match=f"copy.*is the result of benchtop/lrm-s0/{folder.name}"):
        load_results(tmp_path)
    with pytest.raises(UsageError, match="is the result of"):
        stored_keys(tmp_path / "benchtop" / "copy" / folder.name)


def test_hidden_files_are_passed_over_and_second_copies_refused(tmp_path):
    """macOS, notebooks and synchronisers leave such files."""
    folder = whole(tmp_path)
    for hidden in (f"._{RESULT}", f".ipynb_checkpoints/{RESULT}"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        shutil.copy(folder / RESULT, folder / hidden)
    (tmp_path / ".Trash").mkdir()
    shutil.copytree(folder, tmp_path / ".Trash" / folder.name)
    assert len(load_results(tmp_path)) == 1
    shutil.copy(folder / RESULT, folder / "result.sync-conflict-20260102-101010.json")
    with pytest.raises(UsageError, match=r"result\.sync-conflict.* beside result\.json; remove one"):
        load_results(tmp_path)


def test_hidden_files_and_copies_of_schema_1(tmp_path):
    shutil.copytree(HISTORY / "results_v1", tmp_path, dirs_exist_ok=True)
    (file,) = tmp_path.rglob("hps_aa1@*.json")
    file.with_name(f"._{file.name}").write_bytes(b"Mac OS X        \xb0\x01")
    (file.parent / ".ipynb_checkpoints").mkdir()
    shutil.copy(file, file.parent / ".ipynb_checkpoints" / file.name)
    assert len(load_results(tmp_path)) == 2
    shutil.copy(file, file.with_name(f"{file.stem}.sync-conflict-20260102.json"))
    with pytest.raises(UsageError, match="sync-conflict.*is a copy of hps_aa1@"):
        load_results(tmp_path)


def test_results_of_schema_1_load_for_ever():
    """Written by schema 1's first release. Never regenerate them: add a folder for each new version."""
    reward, distance = load_results(HISTORY / "results_v1")
    assert [(r.head.model, v.metric, v.value) for r in (reward, distance) for v in r.values] == [
        ("lrm-s0", "hps", 27.5),
        ("teacher", "fd_efflite0", 12.25),
    ]
    (hps,), (fd,) = reward.values, distance.values
    assert hps.in_sample and reward.head.trained_rewards == ("9a3f00c1",) and reward.head.recipe_sha256 is None
    assert reward.rows(*hps.key).by_image() == {("test/0", 0): 27.0, ("heldout/3", 0): 28.0}
    assert distance.head.training_seed is None and fd.flags == ("n<=d",)
    assert fd.interval.method == "delete-a-group jackknife, 20 groups"


OF_THE_STUDY = {
    "band_db": (-4.332821331912484, "real"),
    "hfer_db": (-3.4141244619749447, "real"),
    "hps": (78.97318013419863, None),
    "kd_efflite0": (226.01016378633136, None),
    "oracle_all": (84.619140625, None),
    "vendi_efflite0": (1.8847193666406277, "real"),
}


def test_results_of_schema_2_load_for_ever():
    """Schema 2's first release, of the same model as ``study_v1``. Never regenerate them."""
    (found,) = load_results(HISTORY / "study_v2")
    (old,) = load_results(HISTORY / "study_v1")
    assert found.head == old.head and {v.metric: (v.value, v.reference) for v in found.values} == OF_THE_STUDY
    assert_equal(found, old)


def assert_equal(found: store.ModelResult, old: store.ModelResult) -> None:
    assert {replace(v, rows_sha256=None) for v in map(_hashable, found.values)} == {
        replace(v, rows_sha256=None) for v in map(_hashable, old.values)
    }
    for each in old.values:
        ours, theirs = found.rows(*each.key), old.rows(*each.key)
        assert (ours and ours.by_image()) == (theirs and theirs.by_image())
        assert found.runs[found.run_of[each.key]] == old.runs[old.run_of[each.key]]
    assert found.training_log == old.training_log and list(found.images) == list(old.images)
    for image, other in zip(found.images.values(), old.images.values(), strict=True):
        assert image.tobytes() == other.tobytes()


def _hashable(value: MetricValue) -> MetricValue:
    protocol = json.dumps(value.protocol.model_dump(), sort_keys=True)
    return replace(value, extra=json.dumps(dict(value.extra), sort_keys=True), protocol=protocol)


def test_schema_1_is_rewritten_without_loss(tmp_path):
    shutil.copytree(HISTORY / "study_v1", tmp_path, dirs_exist_ok=True)
    (old,) = load_results(HISTORY / "study_v1")
    assert migrate(tmp_path) == 1 and migrate(tmp_path) == 0
    (found,) = load_results(tmp_path)
    assert_equal(found, old)
    assert {path.name for path in found.folder.iterdir() if path.is_file()} == {RESULT, SAMPLES, TRAINING, SHEET}


def test_values_measured_again_replace_those_of_schema_1(tmp_path):
    shutil.copytree(HISTORY / "study_v1", tmp_path, dirs_exist_ok=True)
    (old,) = load_results(tmp_path)
    again = replace(old.values[0], value=1.0, rows=None, rows_sha256=None)
    write_values(tmp_path, old.head, RUN, [again], ())
    (found,) = load_results(tmp_path)
    assert len(found.values) == len(old.values) and found.by_key[again.key].value == 1.0
    assert found.training_log == old.training_log


# Logs and sheets


def test_a_log_is_thinned_to_means_of_blocks():
    assert thin(LOG, 3) == [
        {"step": 3, "loss": 2.0, "rare": 7.0},
        {"step": 6, "loss": 5.0},
        {"step": 7, "loss": 7.0},
    ]
    assert thin(LOG, 7) == LOG and thin([], 5) == []
    assert thin([{"step": i, "loss": 1e308} for i in (1, 2)], 1) == [{"step": 2, "loss": 1e308}]
    assert len(thin([{"step": i} for i in range(1001)], 200)) <= 200


def test_the_same_log_is_not_written_again(tmp_path):
    folder = whole(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    write_training_log(folder, HEAD, RUN, LOG)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_sheet_holds_as_many_images_as_fit(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(store, "MAX_SHEET_PIXELS", 9 * 64)
    folder = put(tmp_path, value())
    write_sheet(folder, HEAD, RUN, images(12))
    assert len(load_result(folder).images) == 9 and "first 9 of 12 images" in caplog.text
    assert MAX_SHEET_PIXELS < Image.MAX_IMAGE_PIXELS


# Crashes and concurrency


def test_a_writer_killed_between_any_two_operations_loses_nothing_that_was_stored(tmp_path):
    """Each attempt is a process that ends without clean-up at its n-th change of the disk."""
    for n in itertools.count(1):
        root = tmp_path / str(n)
        folder = put(root, value(rows=[1.0, 2.5]))
        write_sheet(folder, HEAD, RUN, images(2))
        before = read_everything(folder)
        child = os.fork()
        if child == 0:
            _die_at(n, root)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = load_result(folder)
        rows = found.rows(*value().key).values.tolist()
        assert rows in ([1.0, 2.5], [5.0, 6.0]) and found.by_key[value().key].value == (1.75 if rows[0] == 1 else 5.5)
        assert len(found.images) in (2, 5), n
        assert read_everything(folder)[0] == before[0]
        if ended == 0:
            break
        _write_anew(root)
        assert load_result(folder).rows(*value().key).values.tolist() == [5.0, 6.0]
        assert len(load_result(folder).images) == 5 and not list((folder / PARTIAL).glob("*.json"))
    assert n > 25, "each write is several operations"


def _write_anew(root: Path) -> None:
    folder = put(root, value(number=5.5, rows=[5.0, 6.0]), value("oracle_all", 3.0, [1.0, 2.0]))
    write_sheet(folder, HEAD, RUN, images(5))
    write_training_log(folder, HEAD, RUN, LOG)


def _die_at(n: int, root: Path) -> None:
    """Write, and exit at the n-th system call that changes something."""
    counter = itertools.count(1)

    def counted(function):
        def call(*arguments, **options):
            if next(counter) == n:
                os._exit(9)
            return function(*arguments, **options)

        return call

    code = 1
    try:
        for name in ("open", "write", "replace", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        _write_anew(root)
        code = 0
    finally:
        os._exit(code)


def test_folding_twice_changes_nothing(tmp_path):
    folder = whole(tmp_path)
    part = folder / PARTIAL / "00000000000000000001-a.json"
    text = (folder / RESULT).read_text()
    part.write_text(text)  # as after a crash before the folded parts were removed
    fold(folder)
    assert (folder / RESULT).read_text() == text and not part.exists()
    assert len(stored_keys(folder)) == 3


def test_what_killed_writers_leave_is_removed(tmp_path):
    folder = whole(tmp_path)
    left = [folder / ".result.json.7.ab.tmp", folder / PARTIAL / f"1-a.{SAMPLES}", folder / PARTIAL / ".x.tmp"]
    for path in left:
        path.write_bytes(b"x")
        os.utime(path, (1, 1))
    fresh = folder / PARTIAL / f"2-b.{SAMPLES}"
    fresh.write_bytes(b"x")
    put(tmp_path, value("fragility", 1.0))
    assert not any(path.exists() for path in left) and fresh.exists()


def _write_many(root: Path, writer: int, num: int) -> None:
    never_wait_for_the_disk()
    for i in range(num):
        put(root, value(rows=[writer, i], protocol=protocol("hps", writer=writer, i=i)))
        put(root, value("oracle_all", 50.0, [0.0, 100.0]))  # all writers at one value


@pytest.mark.parametrize(("num_writers", "num"), [(8, 40), pytest.param(8, 200, marks=pytest.mark.long)])
def test_concurrent_writers_lose_and_tear_nothing(tmp_path, num_writers, num):
    context = multiprocessing.get_context("forkserver")  # its imports once, and no thread of this process
    context.set_forkserver_preload([__name__])
    writers = [
        context.Process(target=_write_many, args=(tmp_path, i, num // 2), daemon=True) for i in range(num_writers)
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        for found in load_results(tmp_path):  # a reader meanwhile
            assert all(len(found.rows(*v.key).values) == 2 for v in found.values)
        time.sleep(0.5)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    (found,) = load_results(tmp_path)
    assert len(found.values) == num_writers * num // 2 + 1
    assert all(len(found.rows(*v.key).values) == 2 for v in found.values)
    assert not list((found.folder / PARTIAL).iterdir()), "all folded"


def test_a_result_is_removed_by_its_name_and_the_others_stay(cli, tmp_path):
    results = tmp_path / "results"
    folders = {name: make_result(results, name, values={"hps": 1.0}).folder for name in ("lcd-s0", "lrm-s0")}
    other = make_result(results, "lrm-s0", values={"hps": 1.0}, sampling={"steps": 2}).folder
    assert cli("rm", "lrm-s0", "lmr", "--yes").returncode == 2 and other.is_dir()
    done = cli("rm", f"lrm-s0/{other.name}", "--yes")
    assert done.returncode == 0 and not other.exists() and folders["lrm-s0"].is_dir()
    assert cli("rm", "lrm-s0").returncode != 0 and folders["lrm-s0"].is_dir(), "nobody said yes"
    assert cli("rm", "benchtop/lrm-s0/" + folders["lrm-s0"].name, "--yes").returncode == 0
    assert [result.head.model for result in load_results(results)] == ["lcd-s0"]
    assert sorted(path.name for path in (results / "benchtop").iterdir()) == ["lcd-s0"]


def test_a_result_that_is_being_written_is_not_removed(tmp_path):
    folder = make_result(tmp_path, "lcd-s0", values={"hps": 1.0}).folder
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UsageError, match="writing"):
        remove_folder(folder)
    os.close(descriptor)
    assert load_results(tmp_path)
