"""Figures of real images are made once, and again whenever anything they depend on has changed."""

import numpy as np
import pytest
import torch

from rgbench.data.prompts import benchtop_prompts
from rgbench.metrics import cache as kept
from rgbench.metrics.cache import keep_array
from rgbench.metrics.probes.pixels import PixelStatistics
from tests.probing import measure
from tests.tiny_models import make_context


class Maker:
    """Counts how often it is asked."""

    def __init__(self):
        self.asked = 0

    def __call__(self):
        self.asked += 1
        return np.array([[0.1, np.pi], [1e-300, -0.0]])


@pytest.fixture
def maker():
    return Maker()


def test_the_same_question_is_answered_from_disk_bit_for_bit(tmp_path, maker):
    first = keep_array(tmp_path, maker, {"num": 3}, maker)
    second = keep_array(tmp_path, maker, {"num": 3}, maker)
    assert maker.asked == 1
    assert first.tobytes() == second.tobytes() == Maker()().tobytes()
    assert (tmp_path / ".gitignore").read_text() == "*\n"


def test_other_fields_code_or_torch_are_another_question(tmp_path, maker, monkeypatch):
    keep_array(tmp_path, maker, {"num": 3}, maker)
    keep_array(tmp_path, maker, {"num": 4}, maker)
    assert maker.asked == 2
    with monkeypatch.context() as patched:
        patched.setattr(kept, "code_digest", lambda: "changed")
        keep_array(tmp_path, maker, {"num": 3}, maker)
    assert maker.asked == 3
    with monkeypatch.context() as patched:
        patched.setattr(kept, "_source", lambda owner: "a plug-in, edited")
        keep_array(tmp_path, maker, {"num": 3}, maker)
    assert maker.asked == 4
    monkeypatch.setattr(torch, "__version__", "99.0")
    keep_array(tmp_path, maker, {"num": 3}, maker)
    assert maker.asked == 5


@pytest.mark.parametrize("spoil", [lambda b: b[:-9], lambda b: b[:-1] + bytes([b[-1] ^ 1])], ids=["cut", "flipped"])
def test_a_damaged_file_is_made_again_and_said(tmp_path, maker, spoil, caplog):
    keep_array(tmp_path, maker, {}, maker)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(spoil(path.read_bytes()))
    assert keep_array(tmp_path, maker, {}, maker).tobytes() == Maker()().tobytes()
    assert maker.asked == 2 and path.name in caplog.text and "made again" in caplog.text
    keep_array(tmp_path, maker, {}, maker)
    assert maker.asked == 2


class Counting(PixelStatistics):
    """Keeps count of the images it has read."""

    num_read = 0

    def measure(self, images, prompts):
        type(self).num_read += len(images)
        return super().measure(images, prompts)


def test_the_next_evaluation_reads_no_real_image_again(tmp_path):
    images = torch.rand(12, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = [measure(Counting, make_context(benchtop_prompts(12), tmp_path), images) for _ in range(2)]
    assert Counting.num_read == 3 * 12, "evaluated images twice, real images once"
    assert {name: row.value for name, row in found[0].items()} == {name: row.value for name, row in found[1].items()}
    alone = measure(Counting, make_context(benchtop_prompts(11), tmp_path), images[:11])
    assert Counting.num_read == 5 * 12 - 2, "other real images are read"
    assert next(iter(alone.values())).extra["real"] != next(iter(found[0].values())).extra["real"]
