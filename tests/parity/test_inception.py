"""FID's way from images to features: ours over a stream equals clean-fid's over a folder of PNGs, random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid.fid import get_folder_features
from cleanfid.inception_torchscript import InceptionV3W
from PIL import Image
from torchvision.transforms.functional import center_crop

from rgbench.core.errors import UsageError
from rgbench.metrics import networks as module
from rgbench.metrics.features import FeatureSet
from rgbench.metrics.networks import INCEPTION_FILE, InceptionNetwork, find_inception
from rgbench.metrics.reference import ReferenceFolder, from_uint8
from tools.bench.networks import save_inception

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return save_inception(tmp_path_factory.mktemp("inception") / INCEPTION_FILE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Smooth images of several sizes, so that a crop off by a pixel is seen; one under 299 px."""
    folder = tmp_path_factory.mktemp("images")
    for i, (width, height) in enumerate([(64, 64), (321, 360), (400, 303)]):
        coarse = np.random.default_rng(i).integers(0, 256, (9, 11, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


def dmd2(crop: str):
    """What DMD2's evaluation does to both sides before clean-fid's resize."""

    def transform(pixels: np.ndarray) -> np.ndarray:
        image = Image.fromarray(pixels)
        if crop == "patch299":
            return np.array(center_crop(image, 299) if min(image.size) >= 299 else image)
        square = center_crop(image, min(image.size))
        return np.array(square.resize((256, 256), Image.LANCZOS))

    return transform


@pytest.mark.parametrize("crop", ["square256", "patch299"])
def test_features_equal_clean_fids_folder_route(weights, folder, tmp_path, crop):
    theirs = get_folder_features(
        str(folder),
        model=InceptionV3W(str(weights.parent), download=False).eval(),
        num_workers=0,
        batch_size=3,
        device=CPU,
        mode="clean",
        custom_image_tranform=dmd2(crop),
        verbose=False,
    )
    features = FeatureSet(ReferenceFolder(folder, tmp_path), InceptionNetwork(weights, crop, CPU))
    ours = features.reference_rows()
    assert ours.shape == (3, 2048) and theirs.std() > 0.01
    assert np.abs(ours - theirs).max() <= 1e-6 * np.abs(theirs).max()
    image = torch.from_numpy(np.array(Image.open(folder / "1.png"))).permute(2, 0, 1)[None]
    streamed = features(from_uint8(image)).numpy()
    assert np.abs(streamed - theirs[1]).max() <= 1e-5 * np.abs(theirs).max(), "a batch of another size rounds otherwise"
    assert features.num_small() == (1 if crop == "patch299" else 0)


def test_a_missing_or_other_file_is_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UsageError, match=r"inception-2015-12-05.pt .95.6 MB. is not at .*rgbench.*curl -o"):
        find_inception(None)
    with pytest.raises(UsageError, match="is not at .*elsewhere"):
        find_inception(tmp_path / "elsewhere")
    (tmp_path / INCEPTION_FILE).write_bytes(b"another file")
    with pytest.raises(UsageError, match="not the Inception of 2015-12-05 .sha256 "):
        find_inception(tmp_path)
    monkeypatch.setattr(module, "INCEPTION_SHA256", module.sha256_file(tmp_path / INCEPTION_FILE))
    assert find_inception(tmp_path) == find_inception(tmp_path / INCEPTION_FILE)
    with pytest.raises(UsageError, match="not a TorchScript file"):
        InceptionNetwork(tmp_path / INCEPTION_FILE, "square256", CPU)(torch.zeros(1, 3, 299, 299))
