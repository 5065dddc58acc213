"""Named COCO protocols from a command to a figure: reference, captions, departures, and what is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rgbench.core.errors import RgbenchError, UsageError
from rgbench.core.io import sha256_file
from rgbench.data.prompts import benchtop_prompts
from rgbench.evaluate.results import load_results
from rgbench.metrics import networks as inception
from rgbench.metrics.features import FeatureSet
from rgbench.metrics.fid import Moments, frechet_distance, singular
from rgbench.metrics.kid import kid
from rgbench.metrics.networks import INCEPTION_FILE, EffLite0Network, InceptionNetwork
from rgbench.metrics.protocols import PROTOCOLS, find_protocol
from rgbench.metrics.reference import ReferenceFolder, from_uint8
from rgbench.metrics.values import MetricValue, metric_info
from tests.tiny_models import make_context, run_eval, stored_values

NUM = 6
OF_2017 = {"protocol": "coco17-5k", "reference": Path("real"), "inception": Path(INCEPTION_FILE)}
CPU = torch.device("cpu")


class Layers(torch.nn.Module):
    """2,048 numbers of a 299 px image, in the layout of the real file."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(192, 2048))

    def forward(self, x):
        return self.layers(x)


def save_network(path: Path, scale: float = 1.0) -> Path:
    torch.manual_seed(0)
    network = Layers().eval()
    with torch.no_grad():
        network.layers[2].weight.mul_(scale)
        torch.jit.trace(network, torch.zeros(1, 3, 299, 299), check_trace=False).save(path)
    return path


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Captions, real images of several shapes (one grey), images to measure, and a network."""
    monkeypatch.chdir(tmp_path)
    for folder, shapes in (("real", [(40, 30), (30, 50), (33, 33), (64, 48)]), ("made", [(32, 32)] * NUM)):
        Path(folder).mkdir()
        for i, (width, height) in enumerate(shapes):
            pixels = np.random.default_rng(len(folder) + i).integers(0, 256, (height, width, 3), dtype=np.uint8)
            image = Image.fromarray(pixels)
            (image.convert("L") if folder == "real" and i == 3 else image).save(Path(folder, f"{i:05d}.png"))
    rows = [{"image_id": i, "id": i, "caption": f"caption {i}"} for i in range(NUM)]
    Path("captions_val2017.json").write_text(json.dumps({"annotations": rows}))
    save_network(Path(INCEPTION_FILE))
    monkeypatch.setattr(inception, "INCEPTION_SHA256", sha256_file(Path(INCEPTION_FILE)))
    return tmp_path


def resize_all(folder: str) -> None:
    for path in Path(folder).iterdir():
        Image.open(path).resize((32, 32)).save(path)


def run(metrics: list[str], **options) -> dict[str, MetricValue]:
    run_eval(["made"], metrics, **{"prompts": "captions_val2017.json", "keep_images": 0, **options})
    return stored_values()


def by_hand(folder: str, crop: str) -> np.ndarray:
    """Features of a folder, image by image."""
    network = InceptionNetwork(Path(INCEPTION_FILE), crop, CPU)
    paths = sorted(Path(folder).glob("*.png"))
    images = [
        from_uint8(torch.from_numpy(np.array(Image.open(p).convert("RGB"))).permute(2, 0, 1)[None]) for p in paths
    ]
    return torch.cat([network(network.prepare(image)) for image in images]).double().numpy()


def test_a_named_protocol_gives_fid_and_says_where_it_departs(place, capsys):
    found = run(["fid", "kid"], protocol="coco17-5k", reference=Path("real"), inception=Path(INCEPTION_FILE))
    fid = found["fid"]
    assert metric_info("fid").label == "FID" and metric_info("kid").label == "KID ×1000"
    assert fid.protocol.id.startswith("coco17-5k-") and "generated_resolution" not in fid.protocol.fields
    departures = ("captions not of the reference's images", "6 prompts, not 5,000", "reference of 4, not 5,000")
    assert fid.flags == ("n<=d", *departures)
    expected = frechet_distance(*(Moments.of(by_hand(folder, "square256")) for folder in ("made", "real")))
    assert fid.value == pytest.approx(expected, rel=1e-5)
    assert fid.protocol.fields["network_sha256"] == sha256_file(Path(INCEPTION_FILE))
    assert "num_reference_uncropped" not in fid.extra
    assert fid.protocol.fields["reference"]["num"] == 4 and fid.extra["num_reference"] == 4
    printed = capsys.readouterr().err
    assert "captions_val2017: 6 prompts, not a list that rgbench knows, file md5" in printed
    assert "not coco17-5k as published: reference of 4, not 5,000" in printed


def test_the_native_crop_is_another_column_for_another_resolution(place):
    of_2014 = {"protocol": "coco14-30k-patch299", "reference": Path("real"), "inception": Path(INCEPTION_FILE)}
    shutil.copy("captions_val2017.json", "coco14-30k.json")  # the published list's name, not its bytes
    found = run(["kid"], prompts="coco14-30k.json", **of_2014)["kid"]
    assert found.protocol.fields["generated_resolution"] == 32
    assert "captions not the published list" in found.flags
    assert found.value == pytest.approx(1000 * kid(by_hand("made", "patch299"), by_hand("real", "patch299")), rel=1e-3)


def test_captions_are_known_by_their_images(place):
    for i in range(4, NUM):
        Image.new("RGB", (40, 30)).save(f"real/{i:05d}.png")
    assert "captions not of" not in " ".join(run(["kid"], **OF_2017)["kid"].flags)
    Path("real/00003.png").rename("real/00009.png")
    shutil.rmtree("results")
    assert "captions not of the reference's images" in run(["kid"], **OF_2017)["kid"].flags


def test_a_singular_covariance_of_either_side_is_marked(place):
    features = FeatureSet(ReferenceFolder(Path("real"), place / "cache"), EffLite0Network(CPU))
    flags = {num: singular(make_context(benchtop_prompts(num), place, features=features)) for num in (1280, 1281)}
    assert flags == {1280: ("n<=d",), 1281: ("reference n<=d",)}
    scenes = make_context(benchtop_prompts(1281), place)
    assert singular(scenes) == ()


def test_images_under_the_crop_are_counted_and_told(place, caplog):
    caplog.set_level("INFO")
    Image.new("RGB", (301, 299)).save("real/00004.png")
    options = {"protocol": "coco14-30k-patch299", "reference": Path("real"), "inception": Path(INCEPTION_FILE)}
    assert run(["fid"], **options)["fid"].extra["num_reference_uncropped"] == 4
    assert "inception: 4 of 5 reference images have a side under 299 px and stay uncropped" in caplog.text
    assert "generated images of 32 px are smaller than the crop of 299 px" in caplog.text
    caplog.clear()
    run(["kid"], **options)
    assert "4 of 5 reference images" in caplog.text, "also of a reference that is cached"


@pytest.mark.parametrize(("kind", "why"), [("RGBA", "has transparency"), ("CMYK", "mode CMYK"), ("I;16", "mode I;16")])
def test_a_reference_that_is_not_plain_is_refused_or_counted(place, caplog, kind, why):
    """One's own folder can be converted; COCO is what it is, and clean-fid converts it."""
    resize_all("real")
    pixels = np.full((32, 32), 40_000, dtype=np.uint16)
    odd = Image.fromarray(pixels) if kind == "I;16" else Image.open("real/00000.png").convert(kind)
    Path("real/00001.png").unlink()
    odd.save("real/odd.jpg" if kind == "CMYK" else "real/odd.png")
    with pytest.raises(
        UsageError, match=rf"real: 1 of 4 reference images are not plain .*odd\.(png|jpg) has .*{why[-4:]}"
    ):
        run(["kid"], reference=Path("real"))
    found = run(["fid"], **OF_2017)["fid"]
    assert found.extra["num_reference_converted"] == 1
    assert "1 of 4 reference images were converted to 8-bit RGB, such as odd." in caplog.text and why in caplog.text


def test_a_folder_of_ones_own_without_inception(place):
    with pytest.raises(UsageError, match=r"real: 4 of 4 reference images are not 32×32 .*00000\.png 40×30"):
        run(["kid"], reference=Path("real"))
    assert not load_results(Path("results")), "nothing was measured"
    resize_all("real")
    found = run(["kid"], reference=Path("real"))["kd_efflite0"]
    assert metric_info(found.metric).label == "KD-EffLite0 ×1000" and not found.flags
    assert found.protocol.id.startswith("folder-") and found.protocol.fields["generated_resolution"] == 32
    assert found.protocol.fields["reference"]["kind"] == "folder of images"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "coco14"}, "unknown protocol 'coco14'; did you mean 'coco14-30k'"),
        ({"protocol": "coco17-5k"}, "compares with 5,000 real images; name their folder with --reference"),
        ({"protocol": "coco17-5k", "prompts": None}, "give its captions with --prompts FILE"),
        ({"protocol": "coco17-5k", "reference": "absent"}, "absent: no such"),
        ({"protocol": "coco17-5k", "reference": "."}, "not at .*nowhere.*curl -o"),
        ({"inception": "x.pt"}, "--inception serves a named protocol; add --protocol, one of coco14-30k"),
        ({"reference": "results"}, "results: no such"),
    ],
)
def test_what_is_missing_is_named_before_any_image(place, options, message):
    given = {name: Path(value) if name in ("reference", "inception") else value for name, value in options.items()}
    if options.get("reference") == ".":
        given |= {"reference": Path("real"), "inception": Path("nowhere")}
    with pytest.raises(UsageError, match=message):
        run(["kid"], **given)
    assert not load_results(Path("results"))


def test_a_damaged_reference_image_is_named(place):
    resize_all("real")
    Path("real/00001.png").write_bytes(Path("real/00001.png").read_bytes()[:50])
    with pytest.raises(UsageError, match="00001.png: not a readable"):
        run(["kid"], reference=Path("real"))


def test_reference_statistics_follow_the_contents(place):
    def content() -> str:
        return ReferenceFolder(Path("real"), place / "cache").content

    first = content()
    assert content() == first and len(list((place / "cache").glob("folder-*.json"))) == 1
    Path("real").rename("elsewhere")
    assert ReferenceFolder(Path("elsewhere"), place / "cache").content == first, "not where it lies"
    Path("elsewhere").rename("real")
    Image.new("RGB", (40, 30)).save("real/00000.png")
    assert content() != first


def test_features_that_are_not_finite_are_refused(place):
    save_network(Path(INCEPTION_FILE), float("nan"))
    features = FeatureSet(
        ReferenceFolder(Path("real"), place / "cache"), InceptionNetwork(Path(INCEPTION_FILE), "square256", CPU)
    )
    with pytest.raises(RgbenchError, match="features of image 0 of the reference are not finite"):
        features.reference_rows()
    assert not list((place / "cache").glob("*.f32")), "nothing is cached"


def test_the_cache_knows_network_crop_and_images(place):
    folder = ReferenceFolder(Path("real"), place / "cache")
    networks = [
        *(InceptionNetwork(Path(INCEPTION_FILE), crop, CPU) for crop in ("square256", "patch299")),
        EffLite0Network(CPU),
    ]
    rows = [FeatureSet(folder, network).reference_rows() for network in networks]
    assert len(list((place / "cache").glob("*.f32"))) == 3
    assert [r.shape for r in rows] == [(4, 2048), (4, 2048), (4, 1280)] and not np.array_equal(rows[0], rows[1])
    again = FeatureSet(folder, InceptionNetwork(Path(INCEPTION_FILE), "square256", CPU)).reference_rows()
    assert np.array_equal(again, rows[0])


def test_the_protocols_are_those_of_the_document():
    assert {name: (p.num_prompts, p.num_reference, p.crop) for name, p in PROTOCOLS.items()} == {
        "coco14-30k": (30_000, 40_504, "square256"),
        "coco14-30k-patch299": (30_000, 40_504, "patch299"),
        "coco17-5k": (5_000, 5_000, "square256"),
    }
    assert find_protocol("coco17-5k").captions is None
