"""Atomic writes, hashes, and readers on honest input; hostile input is in tests/hostile."""

from __future__ import annotations

import io
import json
import os
import stat
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from rgbench.core.errors import UsageError
from rgbench.core.io import (
    load_pickled_state_dict,
    load_safetensors,
    load_tensors,
    open_image,
    open_tar,
    parse_json,
    read_json,
    read_member,
    save_safetensors_atomic,
    sha256_file,
    sha256_tree,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)


def test_writes_replace_whole_files_and_leave_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "file"
    write_bytes_atomic(file, b"old, and longer")
    write_text_atomic(file, "näw")
    assert file.read_text(encoding="utf-8") == "näw"
    assert os.listdir(file.parent) == ["file"]


def test_written_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_bytes_atomic(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_json_without_nan_and_the_old_file_stays(tmp_path: Path, bad: float) -> None:
    file = tmp_path / "result.json"
    write_json_atomic(file, {"value": 1.5})
    with pytest.raises(ValueError, match=r"result\.json: not written"):
        write_json_atomic(file, {"value": bad})
    assert read_json(file) == {"value": 1.5}
    assert os.listdir(tmp_path) == ["result.json"]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(JSON)
def test_json_round_trip(value: object) -> None:
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ('{"a": 1e999}', "1e999"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' occurs twice"),
        ('{"a": 1', "line 1"),
        ("", "Expecting value"),
        ("[" * 200_000, "recursion"),
        ("1" * 5000, "too large for a number"),
        ("\ufeff{}", "BOM"),
    ],
)
def test_json_that_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=r"bad\.json: not valid JSON") as caught:
        read_json(file)
    assert said in str(caught.value)


def test_json_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(UsageError, match="utf-8"):
        read_json(tmp_path / "latin")
    with pytest.raises(UsageError, match="No such file"):
        read_json(tmp_path / "absent")


def test_sha256_of_a_tree_sees_names_contents_and_nothing_else(tmp_path: Path) -> None:
    def tree(name: str, files: dict[str, str]) -> str:
        for relative, text in files.items():
            file = tmp_path / name / relative
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return sha256_tree(tmp_path / name)

    first = tree("first", {"a": "1", "b/c": "2"})
    assert tree("same", {"b/c": "2", "a": "1"}) == first
    others = [tree("x", {"a": "1", "b/c": "3"}), tree("y", {"a": "1", "b/d": "2"}), tree("z", {"a": "1"})]
    assert len({first, *others}) == 4


def test_safetensors_of_every_dtype_and_layout(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "f64": base.double(),
        "bf16": base.bfloat16(),
        "f16": base.half(),
        "i64": base.long(),
        "u8": base.byte(),
        "bool": base > 3,
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "transposed": base.T,
        "shares_memory": base[1:3],
        "needs_grad": torch.nn.Parameter(base),
        "conjugated": base.to(memory_format=torch.contiguous_format)[:, ::2],
    }
    file = tmp_path / "t.safetensors"
    digest = save_safetensors_atomic(tensors, file, {"made": "here"})
    assert digest == sha256_file(file)
    loaded = load_file(file)  # the library's own reader is the judge of the format
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert load_safetensors(file).keys() == tensors.keys()
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"made": "here"}


def test_safetensors_are_aligned_for_their_dtype(tmp_path: Path) -> None:
    """Readers that map the file into memory rely on it."""
    tensors = {"a": torch.ones(3, dtype=torch.bool), "b": torch.ones(5).double(), "c": torch.ones(1).half()}
    save_safetensors_atomic(tensors, tmp_path / "t")
    data = (tmp_path / "t").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert all(header[name]["data_offsets"][0] % t.element_size() == 0 for name, t in tensors.items())
    assert max(entry["data_offsets"][1] for entry in header.values()) == len(data) - 8 - length


def test_safetensors_refuses_complex_numbers(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="complex64"):
        save_safetensors_atomic({"z": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "z")
    assert not os.listdir(tmp_path)


def test_loaded_tensors_do_not_write_through_to_the_file(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    digest = save_safetensors_atomic({"a": torch.zeros(1000)}, file)
    load_safetensors(file)["a"].fill_(7)
    assert sha256_file(file) == digest


def test_plain_state_dicts_load_with_and_without_wrapper(tmp_path: Path) -> None:
    state = {"weight": torch.randn(2, 3)}
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "wrapped.pt")
    for name in ("plain.pt", "wrapped.pt"):
        assert torch.equal(load_pickled_state_dict(tmp_path / name)["weight"], state["weight"])


def test_the_contents_of_a_weight_file_decide_its_format(tmp_path: Path) -> None:
    state = {"weight": torch.randn(2, 3)}
    torch.save(state, tmp_path / "named.safetensors.pt")
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    save_safetensors_atomic(state, tmp_path / "really-safetensors.bin")
    for file in tmp_path.iterdir():
        assert torch.equal(load_tensors(file)["weight"], state["weight"]), file.name
    with pytest.raises(UsageError, match=r"absent\.pt: cannot read"):
        load_tensors(tmp_path / "absent.pt")
    (tmp_path / "x.safetensors").write_bytes(b"PK")
    with pytest.raises(UsageError, match=r"x\.safetensors: "):
        load_tensors(tmp_path / "x.safetensors")


def turned(orientation: int) -> bytes:
    """An image that is red above white once it is turned as its EXIF says."""
    upright = Image.new("RGB", (16, 24), "white")
    upright.paste("red", (0, 0, 16, 12))
    exif = Image.Exif()
    exif[274] = orientation
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # each orientation's own inverse, as PIL.Image.Transpose
    image = upright.transpose(Image.Transpose(undo[orientation])) if orientation in undo else upright
    return encoded(image, "PNG", exif=exif)


@pytest.mark.parametrize("orientation", range(1, 10))
def test_images_are_turned_upright_where_that_is_asked_for(orientation: int) -> None:
    image = open_image(turned(orientation), upright=True)
    assert image.size == (16, 24)
    assert image.getpixel((8, 2)) == (255, 0, 0) and image.getpixel((8, 22)) == (255, 255, 255)
    if orientation not in (1, 9):
        with pytest.raises(UsageError, match="turned by its EXIF"):
            open_image(turned(orientation), exact=True)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_images_come_out_as_rgb_of_the_right_colour(tmp_path: Path) -> None:
    colour = (200, 40, 90)
    plain = Image.new("RGB", (5, 3), colour)
    palette = plain.quantize(4)
    cases = {
        "rgb": (encoded(plain, "PNG"), colour),
        "bmp": (encoded(plain, "BMP"), colour),
        "webp": (encoded(plain, "WEBP", lossless=True), colour),
        "palette": (encoded(palette, "PNG"), colour),
        "grey": (encoded(Image.new("L", (5, 3), 77), "PNG"), (77,) * 3),
        "grey16": (encoded(Image.fromarray(np.full((3, 5), 77 * 257, np.uint16)), "PNG"), (77,) * 3),
        "bilevel": (encoded(Image.new("1", (5, 3), 1), "PNG"), (255,) * 3),
        "opaque": (encoded(Image.new("RGBA", (5, 3), (*colour, 255)), "PNG"), colour),
        "clear": (encoded(Image.new("RGBA", (5, 3), (*colour, 0)), "PNG"), (255,) * 3),
        "half grey": (encoded(Image.new("LA", (5, 3), (0, 51)), "PNG"), (204,) * 3),
    }
    for name, (data, expected) in cases.items():
        image = open_image(data)
        assert (image.mode, image.size) == ("RGB", (5, 3)), name
        assert image.getpixel((2, 1)) == expected, name
    (tmp_path / "file.png").write_bytes(cases["rgb"][0])
    assert open_image(tmp_path / "file.png").getpixel((0, 0)) == colour


def test_cmyk_jpeg_is_converted() -> None:
    image = open_image(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"))
    assert image.getpixel((4, 4)) == (255, 255, 255)


def test_tar_members_are_listed_and_read_without_extraction(tmp_path: Path) -> None:
    contents = {"a.txt": b"one", "sub/b.jpg": bytes(range(256)) * 9, "./c.txt": b"", "long" * 60 + ".txt": b"pax"}
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        folder = tarfile.TarInfo("sub")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    members = open_tar(tmp_path / "x.tar")
    assert [m.name for m in members] == [name.removeprefix("./") for name in contents]
    with open(tmp_path / "x.tar", "rb") as file:
        assert [read_member(file, m) for m in members] == list(contents.values())
    assert os.listdir(tmp_path) == ["x.tar"]
