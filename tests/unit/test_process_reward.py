"""A reward in another process: what it is sent and gives back, what it says of itself, what a recipe may say of it."""

from __future__ import annotations

import ast
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from rgbench.core.errors import ConfigError, RgbenchError, UsageError
from rgbench.rewards import remote as scorers
from rgbench.rewards.base import ViewedReward, fingerprint_id
from rgbench.rewards.config import HPS, Process
from rgbench.rewards.load import load_reward
from rgbench.rewards.remote import KEPT_LOGS, PROTOCOL, WORKERS, ProcessReward, find_scorer, scorer_module
from rgbench.rewards.workers import runner
from rgbench.train.identity import FREE_KEYS
from rgbench.train.recipe import load_recipe
from tests.process_workers import CHECKSUM, doing, scorer

PROMPTS = ["a red circle", "", "zwölf 🦊 \x00 \ud800", "a red circle"]


@pytest.fixture(autouse=True)
def logs(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rgbench" / "workers"


def checksums(array: np.ndarray) -> torch.Tensor:
    encoded = [prompt.encode("utf-8", "surrogatepass") for prompt in PROMPTS]
    found = [zlib.crc32(image.tobytes() + text) / 2**16 for image, text in zip(array, encoded, strict=True)]
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("takes", ["uint8", "float32"])
def test_every_bit_arrives(tmp_path, takes):
    """Scores of all the bytes of images and prompts; float64 on the way back."""
    generator = torch.Generator().manual_seed(0)
    reward = ProcessReward.load(sys.executable, scorer(tmp_path, CHECKSUM.format(takes=takes)))
    bytes_ = torch.randint(0, 256, (4, 3, 5, 7), generator=generator).byte()
    if takes == "uint8":
        scores = reward(bytes_.double() / 255, PROMPTS)
        assert torch.equal(scores, checksums(bytes_.permute(0, 2, 3, 1).contiguous().numpy()))
        assert torch.equal(reward(bytes_.float() / 255, PROMPTS).double(), scores.float().double())
        for shift in (-0.49 / 255, 0.49 / 255):
            assert torch.equal(reward(bytes_.float() / 255 + shift, PROMPTS).double(), scores.float().double())
    else:
        images = torch.rand(4, 3, 5, 7, generator=generator)
        scores = reward(images, PROMPTS)
        assert torch.equal(scores, checksums(images.numpy()).float()) and scores.dtype == torch.float32
        assert reward(images.half(), PROMPTS).dtype == torch.float32
        assert torch.equal(scores, reward(images.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2), PROMPTS))
    assert len(scores.unique()) == 4
    reward.close()


def test_images_that_are_not_finite_have_no_score(tmp_path):
    """As of any reward: the loop and the judges say which sample it was."""
    reward = doing(tmp_path, "pass")
    images = torch.rand(3, 3, 4, 4)
    images[1, 0, 0, 0] = float("nan")
    assert reward(images, ["a", "b", "c"]).isnan().tolist() == [False, True, False]
    odd = doing(tmp_path, "return [float('inf'), float('nan')]")
    assert str(odd(images[:2], ["a", "b"]).tolist()) == "[inf, nan]"


def test_no_gradient_is_to_be_had(tmp_path):
    reward = doing(tmp_path, "pass")
    images = torch.rand(1, 3, 4, 4, requires_grad=True)
    with pytest.raises(UsageError, match="reward mine: .* gives no gradient"):
        reward(images, ["a"])
    with torch.no_grad():
        assert not reward.differentiable and reward(images, ["a"]).tolist() == [1.0]


def test_the_fingerprint_follows_the_environment_and_not_the_place(tmp_path):
    def print_of(text: str, folder: str = "a", python: str = sys.executable, **options) -> dict:
        (tmp_path / folder).mkdir(exist_ok=True)
        reward = ProcessReward.load(python, scorer(tmp_path / folder, text), options=options)
        reward.close()
        return reward.fingerprint()

    text = 'PACKAGES = ("numpy", "absent-package")\n' + CHECKSUM.format(takes="uint8")
    text = text.replace("load(device)", "load(device, tone=1)")
    first = print_of(text)
    assert {"weights_sha256": "none", "antialias": None, "takes": "uint8", "name": "mine"}.items() <= first.items()
    assert (
        first["versions"]["numpy"] == np.__version__ and first["versions"]["torch"] == torch.__version__.split("+")[0]
    )
    assert first["versions"]["absent-package"] is None and first["python"] == f"3.{sys.version_info[1]}"
    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    assert fingerprint_id(print_of(text, "b")) == fingerprint_id(first)
    assert len({fingerprint_id(f) for f in (first, print_of(text, tone=2), print_of(text + "\n# other"))}) == 3


def test_what_a_recipe_says_reaches_the_worker(tmp_path):
    text = CHECKSUM.format(takes="uint8").replace("load(device)", "load(device, path, level)")
    text = text.replace(
        "return Scorer()", "print(device, path, level); Scorer.contract['logit_scale'] = 3.0; return Scorer()"
    )
    section = Process(
        kind="process", python=sys.executable, worker=scorer(tmp_path, text), path="w.pt", options={"level": [1, 2.5]}
    )
    reward = load_reward(section, device="cpu")
    assert reward.worker.log.read_text() == f"cpu {os.getcwd()}/w.pt [1, 2.5]\n" and reward.logit_scale == 3.0
    assert "logit_scale" not in reward.fingerprint() and "path" not in reward.fingerprint()
    viewed = load_reward(section.model_copy(update={"device": "meta", "blur_sigma": 1.0}), device="cpu")
    assert isinstance(viewed, ViewedReward) and viewed.logit_scale == 3.0
    assert viewed.reward.worker.log.read_text().startswith("meta ")
    assert viewed.fingerprint() == reward.fingerprint() | {"blur_sigma": 1.0}


WRONG = [
    ("reward={kind: process, worker: imagereward}", "reward.python: missing"),
    ("reward={kind: process, python: p, worker: x, antialias: true}", "reward.antialias"),
    ("reward={kind: process, python: p, worker: x, options: {path: y}}", "path is a field of its own"),
    ("reward={kind: process, python: p, worker: x, timeout: 0}", "reward.timeout"),
]


@pytest.mark.parametrize(("override", "message"), WRONG)
def test_a_wrong_section_is_explained(override, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("lrm", [override])


def test_it_guides_no_student_directly():
    section = "{kind: process, python: p, worker: x}"
    assert load_recipe("lrm", [f"reward={section}", "proxy.logit_scale=2"]).reward.worker == "x"
    for reward in (section, f"{{kind: sum, terms: [{section}, {{kind: pickscore, antialias: true}}]}}"):
        with pytest.raises(ConfigError, match=r"reward\.kind: a process gives no gradient.*lrm"):
            load_recipe("rg_lcd", [f"reward={reward}"])
    assert {"reward.python", "reward.terms.*.device", "reward.timeout"} <= FREE_KEYS
    assert "reward.worker" not in FREE_KEYS and HPS(antialias=True).kind == "hps"


def test_old_logs_go(tmp_path, logs):
    logs.mkdir(parents=True)
    for i in range(KEPT_LOGS + 5):
        (logs / f"20200101-0000{i:02d}-x.log").write_text(str(i))
    doing(tmp_path, "pass").close()
    kept = sorted(file.name for file in logs.iterdir())
    assert len(kept) == KEPT_LOGS and kept[0] == "20200101-000006-x.log" and kept[-1].endswith("-mine.log")


def test_scorers_are_found_by_name_file_or_module(tmp_path):
    assert find_scorer("imagereward", "reward")["file"].endswith("rewards/workers/imagereward.py")
    assert find_scorer("package.module", "reward")["file"] is None
    with pytest.raises(UsageError, match=r"reward\.worker .*none\.py: no such file"):
        find_scorer(str(tmp_path / "none.py"), "reward")
    with pytest.raises(UsageError, match="no .py file and no module; did you mean 'imagereward'"):
        find_scorer("image-reward", "reward")
    with pytest.raises(UsageError, match="No module named 'imagerewards'; did you mean 'imagereward'"):
        ProcessReward.load(sys.executable, "imagerewards")
    (tmp_path / "sibling.py").write_text("VALUE = 5.0\n")
    text = "import sibling\n" + CHECKSUM.format(takes="uint8").replace(
        "yield checksum(image, prompt)", "yield sibling.VALUE"
    )
    assert ProcessReward.load(sys.executable, scorer(tmp_path, text))(torch.rand(1, 3, 2, 2), [""]).tolist() == [5.0]


def test_the_environment_is_looked_at_without_weights(tmp_path):
    found = scorers.look(sys.executable, scorer(tmp_path, "import json\nPACKAGES = ('pytest',)\n"))
    assert found.startswith(f"{sys.executable}: Python 3.") and f"pytest {pytest.__version__}" in found
    with pytest.raises(
        UsageError, match=r"imagereward cannot be imported there: no package image-reward; install it with"
    ):
        scorers.look(sys.executable, "imagereward")


STANDARD = {
    *("__future__", "contextlib", "glob", "gzip", "hashlib", "importlib", "inspect", "json", "os", "queue", "struct"),
    *("sys", "tempfile", "types"),
}


@pytest.mark.parametrize("file", sorted(Path(runner.__file__).parent.glob("*.py")), ids=lambda file: file.stem)
def test_what_runs_elsewhere_is_plain_old_python(file):
    """Syntax of 3.8, and nothing but the standard library before ``load``."""
    tree = ast.parse(file.read_text(), feature_version=(3, 8))
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            assert {name.split(".")[0] for name in names} <= STANDARD | {"threading"}
    assert not any(
        "rgbench" in ast.dump(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)
    )


def test_both_ends_agree():
    assert PROTOCOL == runner.PROTOCOL and struct.calcsize(">II") == runner.HEAD.size
    files = {file.stem for file in Path(runner.__file__).parent.glob("*.py")} - {"__init__", "runner"}
    assert files == set(WORKERS)
    for name in WORKERS:
        module = scorer_module(name)
        assert module.INSTALL.startswith("pip install ") and f"{module.PACKAGES[0]}==" in module.INSTALL
        with pytest.raises(RgbenchError):
            ProcessReward.load(sys.executable, name)
