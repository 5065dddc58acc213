"""Checkpoints on a sound disk: round trip, falling back, pruning, optimisers. Broken disks: tests/faults."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rgbench.core.checkpoint import (
    CorruptCheckpoint,
    checkpoints,
    commit,
    flatten_optimiser,
    latest,
    load,
    restore_optimiser,
    verify,
)
from rgbench.core.errors import RgbenchError
from rgbench.core.io import sha256_file


def state(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "student": {"w": torch.full((3, 2), float(step)), "n": torch.tensor(step)},
        "optimiser": {"0.m": torch.ones(2)},
    }


def test_round_trip(tmp_path: Path) -> None:
    path = commit(tmp_path, 250, state(250), {"cost": {"images": 8000}})
    assert path == tmp_path / "step-00000250"
    tensors, meta = load(path)
    assert meta == {"cost": {"images": 8000}}
    assert tensors.keys() == state(250).keys()
    assert all(torch.equal(tensors[part][k], v) for part, values in state(250).items() for k, v in values.items())
    assert sorted(os.listdir(path)) == ["manifest.json", "meta.json", "optimiser.safetensors", "student.safetensors"]


def test_latest_of_none(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "absent") is None


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (5, 10, 15, 100_000_000, 100_000_005):
        commit(tmp_path, step, state(step), {}, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-100000005", "step-100000000"]
    assert len(os.listdir(tmp_path)) == 2


def test_falls_back_to_the_previous_one_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        commit(tmp_path, step, state(step), {})
    (tmp_path / "step-00000002" / "student.safetensors").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert latest(tmp_path) == tmp_path / "step-00000001"
    assert "step-00000002/student.safetensors" in caplog.text
    assert "using" in caplog.text and "step-00000001 instead" in caplog.text


def test_none_intact_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    for step in (1, 2):
        os.remove(commit(tmp_path, step, state(step), {}) / "meta.json")
    with pytest.raises(CorruptCheckpoint, match="no checkpoint is intact") as caught:
        latest(tmp_path)
    assert "step-00000001/meta.json" in str(caught.value) and "step-00000002/meta.json" in str(caught.value)


def test_a_damaged_step_is_replaced_and_an_intact_one_kept(tmp_path: Path) -> None:
    path = commit(tmp_path, 1, state(1), {"first": True})
    assert commit(tmp_path, 1, state(1), {"first": False}) == path
    assert load(path)[1] == {"first": True}
    (path / "student.safetensors").unlink()
    commit(tmp_path, 1, state(1), {"first": False})
    assert load(path)[1] == {"first": False}
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_a_later_damaged_step_does_not_push_out_an_intact_one(tmp_path: Path) -> None:
    for step in (1, 2, 9):
        commit(tmp_path, step, state(step), {}, keep=3)
    (tmp_path / "step-00000009" / "manifest.json").unlink()
    commit(tmp_path, 3, state(3), {}, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000009", "step-00000003", "step-00000002"]
    assert latest(tmp_path) == tmp_path / "step-00000003"


def test_left_overs_of_a_kill_are_ignored_and_swept(tmp_path: Path) -> None:
    commit(tmp_path, 1, state(1), {})
    half = tmp_path / ".tmp-step-00000002-0badf00d"
    half.mkdir()
    (half / "student.safetensors").write_bytes(b"half")
    assert latest(tmp_path) == tmp_path / "step-00000001"
    commit(tmp_path, 2, state(2), {})
    assert not half.exists()


def rewrite_manifest(path: Path, **changes: Any) -> None:
    """Change a manifest as another rgbench, or somebody who knows its hash, would write it."""
    manifest = path / "manifest.json"
    body = {k: v for k, v in json.loads(manifest.read_text()).items() if k != "sha256"} | changes
    digest = hashlib.sha256((json.dumps(body, indent=1) + "\n").encode()).hexdigest()
    manifest.write_text(json.dumps(body | {"sha256": digest}, indent=1) + "\n")


def test_a_checkpoint_of_another_version_is_not_called_damaged(tmp_path: Path) -> None:
    commit(tmp_path, 1, state(1), {})
    rewrite_manifest(commit(tmp_path, 2, state(2), {}), schema_version=2)
    with pytest.raises(RgbenchError, match=r"manifest\.json: schema version 2; this rgbench reads 1") as caught:
        latest(tmp_path)
    assert not isinstance(caught.value, CorruptCheckpoint)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    path = commit(tmp_path / "c", 1, state(1), {})
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes((path / "student.safetensors").read_bytes())
    entry = {"bytes": outside.stat().st_size, "sha256": sha256_file(outside)}
    rewrite_manifest(path, files={"../../outside.safetensors": entry})
    with pytest.raises(CorruptCheckpoint, match=r"manifest\.json"):
        load(path)


def test_files_beside_the_manifest_are_not_loaded(tmp_path: Path) -> None:
    path = commit(tmp_path, 1, state(1), {})
    (path / "stray.safetensors").write_bytes(b"not in the manifest")
    assert load(path)[0].keys() == state(1).keys()


def test_a_folder_moved_to_another_step_is_found_out(tmp_path: Path) -> None:
    path = commit(tmp_path, 1, state(1), {})
    path.rename(tmp_path / "step-00000007")
    with pytest.raises(CorruptCheckpoint, match=r"manifest\.json"):
        verify(tmp_path / "step-00000007")


def test_nan_in_meta_is_refused_and_nothing_left(tmp_path: Path) -> None:
    commit(tmp_path, 1, state(1), {})
    with pytest.raises(ValueError, match="not JSON compliant"):
        commit(tmp_path, 2, state(2), {"loss": float("nan")})
    assert os.listdir(tmp_path) == ["step-00000001"]


def stepped(make: Any, model: nn.Module, steps: int) -> torch.optim.Optimizer:
    optimiser = make(model.parameters())
    for _ in range(steps):
        step_once(model, optimiser)
    return optimiser


def step_once(model: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    optimiser.zero_grad()
    x = torch.linspace(-1, 1, 12).reshape(4, 3)
    model(x).square().sum().backward()
    optimiser.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.9), fused=False),
        lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True, foreach=True),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=1e-2),
        lambda p: torch.optim.AdamW([{"params": [q], "lr": 0.01 * (i + 1)} for i, q in enumerate(p)]),
    ],
)
@pytest.mark.parametrize("steps", [0, 3])
def test_optimisers_go_on_exactly(tmp_path: Path, make: Any, steps: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimiser = stepped(make, model, steps)
    tensors, meta = flatten_optimiser(optimiser)
    path = commit(tmp_path, steps, {"student": model.state_dict(), "optimiser": tensors}, {"optimiser": meta})

    loaded, meta_loaded = load(path)
    other = nn.Linear(3, 2)
    other.load_state_dict(loaded["student"])
    resumed = make(other.parameters())
    restore_optimiser(resumed, loaded.get("optimiser", {}), meta_loaded["optimiser"])
    assert [type(g.get("betas")) for g in resumed.param_groups] == [
        type(g.get("betas")) for g in optimiser.param_groups
    ]
    for _ in range(3):
        step_once(model, optimiser)
        step_once(other, resumed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    again, meta_again = flatten_optimiser(resumed)
    mine, meta_mine = flatten_optimiser(optimiser)
    assert json.dumps(meta_again) == json.dumps(meta_mine)
    assert again.keys() == mine.keys() and all(torch.equal(again[k], mine[k]) for k in mine)


def test_an_optimiser_of_other_parameters_is_refused_unchanged() -> None:
    model = nn.Linear(3, 2)
    tensors, meta = flatten_optimiser(stepped(torch.optim.AdamW, model, 2))
    for other in (nn.Linear(4, 2), nn.Linear(3, 2, bias=False)):
        optimiser = stepped(torch.optim.AdamW, nn.Sequential(other), 0)
        with pytest.raises(RgbenchError, match="checkpoint's optimiser"):
            restore_optimiser(optimiser, tensors, meta)
        assert not optimiser.state
