"""Files made to harm: nothing in them runs, nothing is written, and the error says which file."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rgbench.core.errors import UsageError
from rgbench.core.io import (
    load_pickled_state_dict,
    load_safetensors,
    open_image,
    open_tar,
    read_json,
    refuse_code,
)
from rgbench.models.presets import WEIGHTS
from rgbench.rewards.clip import HPSReward
from rgbench.rewards.latent_proxy import LatentCLIP


class Bomb:
    """Unpickling this leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("suffix", ["pt", "bin", "pkl", "npy", "pth"])
def test_pickles_are_not_executed(tmp_path: Path, suffix: str) -> None:
    mark, file = tmp_path / "executed", tmp_path / f"weights.{suffix}"
    bomb = {"weight": torch.zeros(2), "x": Bomb(mark)}
    if suffix == "npy":
        np.save(file, np.array([Bomb(mark)], dtype=object), allow_pickle=True)
    elif suffix == "pkl":
        file.write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, file, _use_new_zipfile_serialization=suffix != "pth")
    with pytest.raises(UsageError, match=f"weights.{suffix}: refused"):
        load_pickled_state_dict(file)
    with pytest.raises(UsageError, match=f"weights.{suffix}"):
        load_safetensors(file)
    assert not mark.exists()


@pytest.mark.parametrize("content", [[torch.zeros(1)], torch.zeros(1), {"a": 1}, {"a": {"b": torch.zeros(1)}}])
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UsageError, match="expected names and tensors"):
        load_pickled_state_dict(tmp_path / "x.pt")


def test_torchscript_and_missing_files_are_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "script.pt")
    with pytest.raises(UsageError, match=r"script\.pt: refused"):
        load_pickled_state_dict(tmp_path / "script.pt")
    with pytest.raises(UsageError, match="absent"):
        load_pickled_state_dict(tmp_path / "absent.pt")


@given(st.binary(max_size=200), st.integers(0, 2000))
def test_damaged_weights_raise_only_our_error(tmp_path_factory: pytest.TempPathFactory, junk: bytes, at: int) -> None:
    file = tmp_path_factory.mktemp("damaged") / "x.pt"
    out = io.BytesIO()
    torch.save({"weight": torch.arange(64.0)}, out)
    data = out.getvalue()
    file.write_bytes(data[:at] + junk + data[at + len(junk) :])
    for reader in (load_pickled_state_dict, load_safetensors):
        try:
            reader(file)
        except UsageError as error:
            assert str(file) in str(error)


def tar_with(path: Path, change: Callable[[tarfile.TarInfo], None], data: bytes = b"evil") -> Path:
    info = tarfile.TarInfo("ok.txt")
    info.size = len(data)
    change(info)
    with tarfile.open(path, "w") as tar:
        tar.addfile(info, io.BytesIO(data if info.isreg() else b""))
    return path


def named(name: str) -> Callable[[tarfile.TarInfo], None]:
    return lambda info: setattr(info, "name", name)


def special(kind: bytes) -> Callable[[tarfile.TarInfo], None]:
    def change(info: tarfile.TarInfo) -> None:
        info.type, info.linkname, info.size = kind, "/etc/passwd", 0

    return change


@pytest.mark.parametrize(
    "change",
    [
        named("../up.txt"),
        named("a/../../up.txt"),
        named("/etc/passwd"),
        named("..\\up.txt"),
        named("C:evil.txt"),
        named("a//b.txt"),
        named(".."),
        special(tarfile.SYMTYPE),
        special(tarfile.LNKTYPE),
        special(tarfile.CHRTYPE),
        special(tarfile.BLKTYPE),
        special(tarfile.FIFOTYPE),
        special(tarfile.GNUTYPE_SPARSE),
    ],
)
def test_tar_members_that_lead_elsewhere_are_refused(tmp_path: Path, change: Callable[[tarfile.TarInfo], None]) -> None:
    (tmp_path / "in").mkdir()
    file = tar_with(tmp_path / "in" / "x.tar", change)
    with pytest.raises(UsageError, match=r"x\.tar"):
        open_tar(file)
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("address", ["pipe:touch executed", "http://example.org/x.tar", "-", "/dev/zero", "."])
def test_addresses_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no such file"):
        open_tar(Path(address))
    assert not os.listdir(tmp_path)


def test_compressed_and_truncated_tars_and_double_names_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz"):
        pass
    with pytest.raises(UsageError, match="not a readable uncompressed tar"):
        open_tar(tmp_path / "x.tar.gz")
    data = tar_with(tmp_path / "x.tar", named("a.txt"), b"x" * 5000).read_bytes()
    (tmp_path / "short.tar").write_bytes(data[:3000])
    with pytest.raises(UsageError, match="truncated|unexpected end"):
        open_tar(tmp_path / "short.tar")
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("same.txt"))
    with pytest.raises(UsageError, match="'same.txt' occurs twice"):
        open_tar(tmp_path / "twice.tar")


@given(st.lists(st.tuples(st.integers(0, 10_239), st.integers(0, 255)), max_size=12))
def test_damaged_tars_raise_only_our_error(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    file = tmp_path_factory.mktemp("tar") / "x.tar"
    data = bytearray(tar_with(file, named("sub/a.txt"), b"y" * 700).read_bytes())
    for at, value in changes:
        data[at % len(data)] = value
    file.write_bytes(data)
    try:
        members = open_tar(file)
    except UsageError as error:
        assert str(file) in str(error)
    else:
        assert all(".." not in m.name.split("/") and not m.name.startswith("/") for m in members)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_claiming(width: int, height: int) -> bytes:
    """A tiny file that says it is huge."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_000, 60_000])
def test_image_bombs_are_refused_before_decoding(side: int) -> None:
    with pytest.raises(UsageError, match="image bytes: .*(exceeds|decompression bomb)"):
        open_image(png_claiming(side, side))


def test_the_pixel_limit_is_the_callers() -> None:
    out = io.BytesIO()
    Image.new("RGB", (20, 20)).save(out, "PNG")
    with pytest.raises(UsageError, match="20×20 exceeds 399 pixels"):
        open_image(out.getvalue(), max_pixels=399)
    assert open_image(out.getvalue(), max_pixels=400).size == (20, 20)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_truncated_images_are_refused(tmp_path: Path, kind: str) -> None:
    out = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(out, kind)
    data = out.getvalue()
    (tmp_path / "whole").write_bytes(data)
    assert open_image(tmp_path / "whole").size == (48, 48)
    for share in (0.02, 0.3, 0.6, 0.9):
        (tmp_path / "cut").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(UsageError, match="cut: not a readable"):
            open_image(tmp_path / "cut")


def test_other_formats_and_float_pixels_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "x.tiff")
    Image.new("RGB", (4, 4)).save(tmp_path / "x.eps")
    for name in ("x.tiff", "x.eps"):
        with pytest.raises(UsageError, match=name):
            open_image(tmp_path / name)
    with pytest.raises(UsageError, match="no such file"):
        open_image(tmp_path / "absent.png")


@given(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP"]), st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255))))
def test_damaged_images_raise_only_our_error(kind: str, changes: list[tuple[int, int]]) -> None:
    out = io.BytesIO()
    Image.linear_gradient("L").resize((32, 24)).convert("RGB").save(out, kind)
    data = bytearray(out.getvalue())
    for at, value in changes:
        data[at % len(data)] = value
    try:
        assert open_image(bytes(data)).mode == "RGB"
    except UsageError as error:
        assert "image bytes" in str(error)


@given(st.binary(max_size=300))
def test_damaged_json_raises_only_our_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.mktemp("json") / "x.json"
    file.write_bytes(data)
    try:
        read_json(file)
    except UsageError as error:
        assert str(file) in str(error)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("open_clip_config.json", {"model_cfg": {"text_cfg": {"tokenizer_kwargs": {"trust_remote_code": True}}}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}),
        ("sub/config.json", [{"deep": {"auto_map": {"AutoModel": "own.Model"}}}]),
    ],
)
def test_configurations_that_ask_for_code_are_refused(tmp_path: Path, name: str, values: object) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(values))
    with pytest.raises(UsageError, match=f"{name}: (trust_remote_code|auto_map)"):
        refuse_code(tmp_path)
    file.write_text(json.dumps(values).replace("true", "false").replace("auto_map", "automatic"))
    refuse_code(tmp_path)


@pytest.mark.parametrize("part", ["reward", "latent_proxy"])
def test_a_clip_folder_runs_no_code(tmp_path: Path, part: str) -> None:
    """Whichever way it is loaded; transformers would import the file, or ask on standard input whether to."""
    folder, mark = tmp_path / part, tmp_path / "executed"
    shutil.copytree(WEIGHTS / part, folder)
    (folder / "rgbench.sha256").unlink(missing_ok=True)  # a hostile folder is sealed as it is, or not at all
    (folder / "own.py").write_text(
        f"open({str(mark)!r}, 'w')\nfrom transformers import CLIPTokenizer as OwnTokenizer\n"
    )
    config = folder / "open_clip_config.json"
    values = json.loads(config.read_text())
    values["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    config.write_text(json.dumps(values))
    tokenizer = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}}
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | own))
    for remove in (None, config):
        if remove:
            remove.write_text(remove.read_text().replace('"trust_remote_code": true', ""))
        with pytest.raises(UsageError, match="asks for Python code"):
            if part == "reward":
                HPSReward.load(folder, antialias=True, device="cpu")
            else:
                LatentCLIP.load(folder, "cpu")
    assert not mark.exists()
