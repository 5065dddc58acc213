"""What comes from elsewhere and was made to harm: each reader that a user calls names the file, runs nothing of it, and
writes nowhere."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from rgbench.core.checkpoint import CorruptCheckpoint, commit, latest
from rgbench.core.errors import UsageError
from rgbench.core.io import canonical_sha256, load_tensors
from rgbench.data.config import HFDatasetData, ImageFolderData, WebDatasetData
from rgbench.data.prompts import load_prompts
from rgbench.data.sources import open_source
from rgbench.evaluate.images import GivenImages, own_prompts
from rgbench.evaluate.results import SAMPLES, SHEET, TRAINING, load_results
from rgbench.evaluate.targets import resolve_targets
from rgbench.models.pipeline import load_models
from rgbench.models.presets import WEIGHTS
from rgbench.models.student import Student, load_student
from rgbench.rewards.clip import HPSReward, load_clip, read_clip
from rgbench.rewards.latent_proxy import LatentCLIP
from rgbench.train.recipe import load_recipe
from rgbench.train.train import export_run
from tests.clip_folder import save_clip
from tests.conftest import ROOT, Cli
from tests.hostile.test_files import Bomb, png_chunk, png_claiming
from tests.results_maker import make_result
from tests.tiny_models import save_pipeline, save_run

Make = Callable[[Path], Any]
Read = Callable[[Path], Any]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the cases damage: a pipeline, a student's run, results, and rewards in both layouts."""
    root = tmp_path_factory.mktemp("parts")
    save_pipeline(root / "pipeline", student=False)
    save_run(root / "run")
    save_clip(root / "clip")
    shutil.copytree(WEIGHTS / "reward", root / "reward")
    shutil.copytree(WEIGHTS / "latent_proxy", root / "latent_proxy")
    make_result(root / "results", "lcd-s0", rows={"hps": np.arange(4.0)}, log=[{"step": 1, "loss": 1.0}])
    return root


def snapshot(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.is_file() and path.lstat().st_size for path in root.rglob("*")}


CASES: list[Any] = []


def case(name: str, read: Read, make: Make, says: str, *, kind: type[Exception] = UsageError) -> None:
    CASES.append(pytest.param(read, make, says, kind, id=name))


# Readers: what a user calls, given the folder that holds the hostile thing


def weights(name: str) -> Read:
    return lambda folder: load_tensors(folder / name)


def recipe(folder: Path) -> None:
    load_recipe(str(folder / "x.yaml"))


def pipeline(folder: Path) -> None:
    load_models(folder / "pipeline", CPU, torch.float32)


def lora(folder: Path) -> None:
    load_student(Student("benchtop", lora=folder / "lora"), CPU, torch.float32)


def unet(folder: Path) -> None:
    load_student(Student("benchtop", unet=folder / "unet.bin"), CPU, torch.float32)


def hps(folder: Path) -> None:
    HPSReward.load(folder / "reward", antialias=True, device="cpu")


def hps_file(folder: Path) -> None:
    read_clip(folder / "HPS_v2.1_compressed.pt")


def transformers_clip(folder: Path) -> None:
    load_clip(folder / "clip", CPU, torch.float32)


def proxy(folder: Path) -> None:
    LatentCLIP.load(folder / "latent_proxy", "cpu")


def prompts(name: str) -> Read:
    return lambda folder: load_prompts(folder / name)


def training_images(folder: Path) -> None:
    open_source(
        ImageFolderData.model_validate({"kind": "image_folder", "path": str(folder / "images"), "resolution": 8})
    )


def tars(folder: Path) -> None:
    source = open_source(WebDatasetData.model_validate({"kind": "webdataset", "path": str(folder), "resolution": 8}))
    source.load([0])


def rows(folder: Path) -> None:
    keys = {"kind": "hf_dataset", "path": str(folder / "x.parquet"), "resolution": 8}
    open_source(HFDatasetData.model_validate(keys)).load([0])


def measured_images(folder: Path) -> None:
    prompts = own_prompts(folder / "images", 0)
    GivenImages(folder / "images", prompts, prompts, 0, None)


def results(folder: Path) -> None:
    for result in load_results(folder / "results"):
        for value in result.values:
            result.rows(*value.key)
        assert result.images is not None and result.training_log is not None


def run(folder: Path) -> None:
    resolve_targets([str(folder / "run")], folder / "runs")


def exported(folder: Path) -> None:
    export_run(folder / "run", "student", folder / "exported")  # type: ignore[arg-type]


def resumed(folder: Path) -> None:
    latest(folder / "run" / "checkpoints")


# Makers


def pickled(name: str, legacy: bool = False) -> Make:
    def make(folder: Path) -> None:
        bomb = {"weight": torch.zeros(2), "x": Bomb(folder / "executed")}
        torch.save(bomb, folder / name, _use_new_zipfile_serialization=not legacy)

    return make


def plainly_pickled(name: str) -> Make:
    return lambda folder: (folder / name).write_bytes(pickle.dumps(Bomb(folder / "executed")))


def pickled_array(name: str) -> Make:
    def make(folder: Path) -> None:
        with open(folder / name, "wb") as file:
            bomb = np.array([Bomb(folder / "executed")], dtype=object)
            (np.savez if name.endswith("npz") else np.save)(file, bomb)

    return make


for name in ("x.pt", "x.bin", "x.ckpt"):
    case(f"pickle {name}", weights(name), pickled(name), name)
case("old pickle", weights("x.pth"), pickled("x.pth", legacy=True), "x.pth")
case("pickle named safetensors", weights("x.safetensors"), pickled("x.safetensors"), "x.safetensors")
case("plain pickle", weights("x.bin"), plainly_pickled("x.bin"), "x.bin")
for name in ("x.npy", "x.npz"):
    case(f"pickle {name}", weights(name), pickled_array(name), name)


def header(text: str | bytes, length: int | None = None, data: bytes = bytes(16)) -> Make:
    raw = text.encode() if isinstance(text, str) else text
    size = len(raw) if length is None else length
    return lambda folder: (folder / "x.safetensors").write_bytes(struct.pack("<Q", size) + raw + data)


def tensor(dtype: str = "F32", shape: str = "[2]", offsets: str = "[0,8]", name: str = "a") -> str:
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


HEADERS: dict[str, Make] = {
    "overlapping": header(f"{{{tensor()},{tensor(offsets='[4,12]', name='b')}}}"),
    "a hole": header(f"{{{tensor()},{tensor(offsets='[12,20]', name='b')}}}", data=bytes(20)),
    "huge header": header("{}", length=2**62),
    "negative": header(f"{{{tensor(offsets='[-8,0]')}}}"),
    "negative shape": header(f"{{{tensor(shape='[-2]')}}}"),
    "past the end": header(f"{{{tensor(shape='[99999999]', offsets='[0,399999996]')}}}"),
    "product overflows": header(f"{{{tensor(shape='[4294967296,4294967296]')}}}"),
    "wrong dtype": header(f"{{{tensor(dtype='F99')}}}", data=bytes(8)),
    "dtype of another size": header(f"{{{tensor(dtype='F64')}}}", data=bytes(8)),
    "duplicate keys": header(f"{{{tensor()},{tensor(offsets='[8,16]')}}}"),
    "no end": header('{"a":{"dtype":"F32"'),
    "deep": header("[" * 5000),
    "not UTF-8": header(b'{"\xff":1}'),
    "bytes left over": header(f"{{{tensor()}}}", data=bytes(99)),
    "empty": lambda folder: (folder / "x.safetensors").write_bytes(b""),
}
for name, make in HEADERS.items():
    case(f"safetensors, {name}", weights("x.safetensors"), make, "x.safetensors")


def text(name: str, content: str | bytes) -> Make:
    raw = content.encode() if isinstance(content, str) else content

    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)

    return make


ANCHORS = "a: &a [x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)
YAMLS: dict[str, str | bytes] = {
    "python tag": "kind: !!python/object/apply:os.mkdir [executed]\n",
    "python name": "kind: !!python/name:os.system\n",
    "anchors": ANCHORS,
    "merge key": "base: &b {kind: lcd}\nmodel:\n  <<: *b\n",
    "key twice": "kind: lcd\nkind: lrm\n",
    "NaN": "kind: lcd\ntrain: {lr: .nan}\n",
    "deep": "kind: " + "[" * 5000,
    "binary": b"\x00\xff\xfe\x80",
    "megabytes": "kind: " + "x" * 3_000_000,
    "two documents": "kind: lcd\n---\nkind: lrm\n",
    "no mapping": "- kind\n",
    "path in a name": "kind: lcd\nname: ../../out\nmodel: {preset: benchtop}\ndata: {kind: scenes}\n",
}
for name, content in YAMLS.items():
    case(f"recipe, {name}", recipe, text("x.yaml", content), "x.yaml")


# Models


def copied(part: str, change: Callable[[Path], Any]) -> Make:
    """A part, then changed."""

    def make(folder: Path) -> None:
        shutil.copytree(folder.parent / "parts" / part, folder / part, symlinks=True)
        change(folder / part)

    return make


def keys(name: str, **values: Any) -> Callable[[Path], Any]:
    """Change keys of a JSON file."""

    def change(folder: Path) -> None:
        file = folder / name
        content = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(content | values))

    return change


def code(folder: Path, name: str) -> None:
    (folder / name).write_text(f"import os\nos.mkdir({str(folder.parent / 'executed')!r})\n")


def with_code(name: str, change: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda folder: (code(folder, name), change(folder))


def linked(name: str) -> Callable[[Path], Any]:
    """Put a link to a file outside in place of a file."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/etc/passwd")

    return change


def replaced(name: str, content: str | bytes) -> Callable[[Path], Any]:
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw)


def as_pickle(name: str, old: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / old).unlink()
        torch.save({"x": Bomb(folder.parent / "executed")}, folder / name)

    return change


UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def quantised(folder: Path) -> None:
    state = load_file(folder / UNET_WEIGHTS)
    whole = {name: (tensor * 100).to(torch.int8) for name, tensor in state.items()}
    save_file(whole, folder / UNET_WEIGHTS, {"format": "pt"})


PIPELINES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "class of os": (keys("model_index.json", _class_name="os.system"), "model_index.json"),
    "class of another module": (keys("model_index.json", _class_name=["pipeline", "Own"]), "model_index.json"),
    "unet of another module": (with_code("unet/own.py", keys(UNET, _class_name="own.Model")), UNET),
    "unet os.system": (keys(UNET, _class_name="os.system"), UNET),
    "auto_map": (
        with_code("text_encoder/own.py", keys(TEXT, auto_map={"AutoModel": "own.M"}, architectures=["M"])),
        TEXT,
    ),
    "scheduler of os": (keys("scheduler/scheduler_config.json", _class_name="os.system"), "scheduler_config.json"),
    "index out of the folder": (
        lambda folder: (
            (folder / UNET_WEIGHTS).unlink(),
            keys(f"{UNET_WEIGHTS}.index.json", weight_map={"a": "../../../x.safetensors"})(folder),
        ),
        "diffusion_pytorch_model.safetensors.index.json",
    ),
    "weights as a pickle": (as_pickle("unet/diffusion_pytorch_model.bin", UNET_WEIGHTS), "unet"),
    "weights linked outside": (linked(UNET_WEIGHTS), "unet"),
    "config linked outside": (linked(UNET), UNET),
    "huge network": (keys(UNET, block_out_channels=[2**40, 2**40]), "unet"),
    "text for a number": (keys(UNET, sample_size="64; rm"), UNET),
    "blocks of os": (keys(UNET, down_block_types=["os.system", "DownBlock2D"]), "unet"),
    "activation of os": (keys(TEXT, hidden_act="os.system"), "text_encoder"),
    "quantised weights": (quantised, UNET_WEIGHTS),
    "tokenizer in pieces": (replaced("tokenizer/vocab.json", "{"), "tokenizer"),
    "noise schedule that is endless": (
        keys("scheduler/scheduler_config.json", num_train_timesteps=10**12),
        "scheduler",
    ),
    "scaling factor of text": (keys(VAE, scaling_factor="1e999"), "vae"),
    "config is a list": (replaced(VAE, "[]"), VAE),
    "config with NaN": (replaced(VAE, '{"scaling_factor": NaN}'), VAE),
}
for name, (change, says) in PIPELINES.items():
    case(f"pipeline, {name}", pipeline, copied("pipeline", change), says)


def adapter(name: str, content: Mapping[str, torch.Tensor] | None, config: Mapping[str, Any] | None = None) -> Make:
    def make(folder: Path) -> None:
        (folder / "lora").mkdir()
        if content is None:
            torch.save({"x": Bomb(folder / "executed")}, folder / "lora" / name)
        else:
            save_file(dict(content), folder / "lora" / name)
        if config is not None:
            (folder / "lora" / "adapter_config.json").write_text(json.dumps(config))

    return make


ONE = {"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}
case("lora, pickle named safetensors", lora, adapter("adapter_model.safetensors", None), "adapter_model.safetensors")
case("lora, pickle", lora, adapter("adapter_model.bin", None), "lora")
case(
    "lora, path in a name", lora, adapter("x.safetensors", {"unet.../../etc.lora_A.weight": torch.zeros(2, 2)}), "x.saf"
)
case("lora, config of code", lora, adapter("adapter_model.safetensors", ONE, {"auto_mapping": {"p": "os"}}), "adapter")
case("unet, pickle", unet, pickled("unet.bin"), "unet.bin")
case("reward, pickle of HPS", hps_file, pickled("HPS_v2.1_compressed.pt"), "HPS_v2.1_compressed.pt")

TEXT_CFG = {"context_length": 32, "vocab_size": 654, "width": 128, "heads": 4, "layers": 4, "hf_tokenizer_name": "."}
VISION_CFG = {"image_size": 28, "layers": 4, "width": 128, "head_width": 32, "patch_size": 4}
CLIP_CFG = {"embed_dim": 128, "vision_cfg": VISION_CFG}


def clip_config(**text: Any) -> Callable[[Path], Any]:
    return keys("open_clip_config.json", model_cfg={**CLIP_CFG, "text_cfg": {**TEXT_CFG, **text}})


REWARDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "text tower of the hub": (clip_config(hf_model_name="evil/code"), "open_clip_config.json"),
    "tokenizer with code": (clip_config(tokenizer_kwargs={"trust_remote_code": True}), "open_clip_config.json"),
    "config is a list": (replaced("open_clip_config.json", "[]"), "open_clip_config.json"),
    "no vision": (
        keys("open_clip_config.json", model_cfg={"embed_dim": 128, "text_cfg": TEXT_CFG}),
        "open_clip_config",
    ),
    "text for a tower": (keys("open_clip_config.json", model_cfg={**CLIP_CFG, "text_cfg": "x"}), "open_clip_config"),
    "huge tower": (
        keys("open_clip_config.json", model_cfg={**CLIP_CFG, "embed_dim": 2**50, "text_cfg": TEXT_CFG}),
        "reward",
    ),
    "weights as a pickle": (
        lambda folder: torch.save({"x": Bomb(folder.parent / "executed")}, folder / "open_clip_model.safetensors"),
        "open_clip_model.safetensors",
    ),
    "tokenizer in pieces": (replaced("tokenizer.json", '{"version": 1}'), "reward"),
    "auto_map": (keys("tokenizer_config.json", auto_map={"AutoTokenizer": ["own.T", None]}), "tokenizer_config.json"),
}
for name, (change, says) in REWARDS.items():
    case(f"reward, {name}", hps, copied("reward", change), says)
PROXIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no text tower": (replaced("config.json", "{}"), "config.json"),
    "a list": (replaced("config.json", "[1]"), "config.json"),
    "towers of text": (keys("config.json", vision_cfg="x"), "config.json"),
    "unknown fields": (keys("config.json", vision_cfg={"image_size": 8, "os": "system"}), "config.json"),
    "tokenizer with code": (keys("tokenizer_config.json", trust_remote_code=True), "tokenizer_config.json"),
}
for name, (change, says) in PROXIES.items():
    case(f"proxy, {name}", proxy, copied("latent_proxy", change), says)
CLIPS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "auto_map": (keys("config.json", auto_map={"AutoModel": "own.M"}), "config.json"),
    "another architecture": (keys("config.json", model_type="os"), "clip"),
    "towers of text": (keys("config.json", vision_config="x"), "clip"),
    "cut weights": (replaced("model.safetensors", bytes(100)), "clip"),
    "pickle named safetensors": (
        lambda folder: torch.save({"x": Bomb(folder.parent / "executed")}, folder / "model.safetensors"),
        "clip",
    ),
}
for name, (change, says) in CLIPS.items():
    case(f"transformers CLIP, {name}", transformers_clip, copied("clip", change), says)


# Prompts and data


PROMPTS: dict[str, tuple[str, str | bytes]] = {
    "NUL": ("x.txt", b"a\nb\0c\n"),
    "not UTF-8": ("x.txt", b"a\n\xff\xfe\n"),
    "UTF-16": ("x.txt", "a red circle".encode("utf-16")),
    "mark alone": ("x.txt", b"\xef\xbb\xbf\n"),
    "NUL in JSON": ("x.jsonl", r'{"text": "a\u0000b"}'),
    "half a character": ("x.jsonl", r'{"text": "a\ud800"}'),
    "NaN": ("x.jsonl", '{"text": NaN}'),
    "huge": ("x.jsonl", '{"text": "a", "id": 1e999}'),
    "deep": ("x.jsonl", '{"text": ' + "[" * 100_000),
    "key twice": ("x.jsonl", '{"text": "a", "text": "b"}'),
    "id twice": ("x.jsonl", '{"text": "a", "id": "b"}\n{"text": "c", "id": "b"}'),
    "scene of another kind": ("x.jsonl", '{"text": "a", "scene": {"layout": {"x": 1}}}'),
    "COCO without captions": ("x.json", '{"annotations": [{"image_id": {}, "id": 1, "caption": "a"}]}'),
    "COCO ids that are fractions": ("x.json", '{"annotations": [{"image_id": 1.5, "id": 1, "caption": "a"}]}'),
    "compressed": ("x.jsonl", b"\x1f\x8b\x08\x00" + bytes(60)),
    "COCO deep": ("x.json", "[" * 100_000),
    "whole number of a million digits": ("x.json", '{"annotations": ' + "9" * 1_000_000 + "}"),
    "TSV without columns": ("x.tsv", "a\tb\n1\t2\n"),
    "10 MB line of NUL": ("x.txt", b"\0" * 10_000_000),
}
for name, (file, content) in PROMPTS.items():
    case(f"prompts, {name}", prompts(file), text(file, content), file)


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> Make:
    def make(folder: Path) -> None:
        with tarfile.open(folder / "x.tar", "w") as out:
            for info, data in members:
                info.size = len(data) if info.isreg() else 0
                out.addfile(info, io.BytesIO(data))

    return make


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def claiming_huge(folder: Path) -> None:
    tar((member("a.txt"), b"x" * 600))(folder)
    raw = bytearray((folder / "x.tar").read_bytes())
    raw[124:136] = b"77777777777\0"
    raw[148:156] = f"{sum(raw[:148]) + 8 * 32 + sum(raw[156:512]):06o}\0 ".encode()
    (folder / "x.tar").write_bytes(raw)


TARS: dict[str, Make] = {
    "climbs": tar((member("../a.txt"), b"x")),
    "absolute": tar((member("/tmp/a.txt"), b"x")),
    "backslash": tar((member("..\\a.txt"), b"x")),
    "link": tar((member("a.png", tarfile.SYMTYPE, "/etc/passwd"), b"")),
    "hard link": tar((member("a.png", tarfile.LNKTYPE, "../x"), b"")),
    "device": tar((member("a.png", tarfile.CHRTYPE), b"")),
    "pipe": tar((member("a.png", tarfile.FIFOTYPE), b"")),
    "huge size": claiming_huge,
    "name twice": tar((member("a.txt"), b"x"), (member("a.txt"), b"y")),
    "image of text": tar((member("a.png"), b"#!/bin/sh"), (member("a.txt"), b"x")),
    "bomb": tar((member("a.png"), png_claiming(60_000, 60_000)), (member("a.txt"), b"x")),
    "caption of NUL": tar((member("a.png"), b""), (member("a.txt"), b"\0\0")),
    "compressed": lambda folder: (folder / "x.tar").write_bytes(b"\x1f\x8b" + bytes(600)),
}
for name, make in TARS.items():
    case(f"tar, {name}", tars, make, "x.tar")


def table(**columns: Any) -> Make:
    return lambda folder: pq.write_table(pa.table(columns), folder / "x.parquet")


def png_bytes() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    return out.getvalue()


IMAGE = {"bytes": png_bytes(), "path": None}
TABLES: dict[str, Make] = {
    "outside": table(image=[{"bytes": None, "path": "/etc/passwd"}], text=["a"]),
    "climbs": table(image=[{"bytes": None, "path": "../../x.png"}], text=["a"]),
    "bomb": table(image=[{"bytes": png_claiming(60_000, 60_000), "path": None}], text=["a"]),
    "caption of numbers": table(image=[IMAGE], text=[1]),
    "image of numbers": table(image=[1], text=["a"]),
    "image of text": table(image=["/etc/passwd"], text=["a"]),
    "no column": table(image=[IMAGE], caption=["a"]),
    "no row": table(
        image=pa.array([], pa.struct([("bytes", pa.binary()), ("path", pa.string())])), text=pa.array([], pa.string())
    ),
    "no parquet": text("x.parquet", "PAR1<script>PAR1"),
    "empty": text("x.parquet", ""),
}
for name, make in TABLES.items():
    case(f"parquet, {name}", rows, make, "x.parquet")


# Images


def image(content: Callable[[], bytes], name: str = "a.png") -> Make:
    def make(folder: Path) -> None:
        (folder / "images").mkdir()
        (folder / "images" / name).write_bytes(content())
        (folder / "images" / Path(name).with_suffix(".txt").name).write_text("a caption")
        row = {"file_name": name, "text": "a caption"}
        (folder / "images" / "metadata.jsonl").write_text(json.dumps(row))

    return make


def encoded(mode: str, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    Image.fromarray(noise).convert("RGB").convert(mode).save(out, kind, **options)
    return out.getvalue()


def animated() -> bytes:
    return encoded("RGB", "PNG", save_all=True, append_images=[Image.new("RGB", (32, 32))])


def sixteen_bits() -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32)).save(out, "PNG")
    return out.getvalue()


def text_bomb() -> bytes:
    whole = encoded("RGB", "PNG")
    chunk = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000)))
    return whole[:33] + chunk + whole[33:]


BROKEN: dict[str, Callable[[], bytes]] = {
    "truncated": lambda: encoded("RGB", "PNG")[:900],
    "bomb": lambda: png_claiming(60_000, 60_000),
    "markup": lambda: b"<svg onload='x'/>",
    "postscript": lambda: b"%!PS-Adobe\n(%pipe%touch executed) (w) file",
    "TIFF called PNG": lambda: encoded("RGB", "TIFF"),
    "GIF called PNG": lambda: encoded("RGB", "GIF"),
    "empty": bytes,
    "text that unpacks to 100 MB": text_bomb,
}
for name, content in BROKEN.items():
    case(f"training image, {name}", training_images, image(content), "a.png")


def pipe(folder: Path) -> None:
    """A named pipe among the images, at which a reader would wait for ever."""
    image(png_bytes, "b.png")(folder)
    os.mkfifo(folder / "images" / "a.png")
    (folder / "images" / "a.txt").write_text("a caption")
    rows = [{"file_name": name, "text": "a caption"} for name in ("a.png", "b.png")]
    (folder / "images" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


case("training image, pipe", training_images, pipe, "a.png")
case("measured image, pipe", measured_images, pipe, "a.png")
INEXACT = {
    "animated": animated,
    "16 bits": sixteen_bits,
    "transparent": lambda: encoded("RGBA", "PNG"),
}
for name, content in {**BROKEN, **INEXACT}.items():
    case(f"measured image, {name}", measured_images, image(content), "a.png")
case("measured image, CMYK", measured_images, image(lambda: encoded("CMYK", "JPEG"), "a.jpg"), "a.jpg")


def listing(*entries: Mapping[str, Any]) -> Make:
    def make(folder: Path) -> None:
        image(png_bytes)(folder)
        (folder / "images" / "metadata.jsonl").unlink()
        (folder / "images" / "index.json").write_text(json.dumps(list(entries)))

    return make


ENTRY = {"file": "a.png", "prompt_id": "a", "prompt": "a caption", "seed": 0}
case("measured image, listed outside", measured_images, listing(ENTRY | {"file": "../../x.png"}), "images")
case("measured image, listed absolutely", measured_images, listing(ENTRY | {"file": "/etc/x.png"}), "images")
case("measured image, listed as a list", measured_images, listing(ENTRY | {"file": ["a"]}), "index.json")


# Results


def result(change: Callable[[Path], Any]) -> Make:
    def inside(folder: Path) -> None:
        (place,) = {path.parent for path in folder.rglob("result.json")}
        change(place)

    return copied("results", inside)


def resealed(**values: Any) -> Callable[[Path], Any]:
    """Change keys of result.json and give it the sha256 of what it says now, as who makes it by hand would."""

    def change(place: Path) -> None:
        content = json.loads((place / "result.json").read_text())
        content.pop("sha256")
        content |= values
        (place / "result.json").write_text(json.dumps(content | {"sha256": canonical_sha256(content)}))

    return change


def other_rows(place: Path) -> None:
    stored = pq.read_table(place / SAMPLES)
    column = stored.column_names[-1]
    changed = stored.set_column(len(stored.column_names) - 1, column, pa.array(np.arange(len(stored)) + 7.0))
    pq.write_table(changed, place / SAMPLES)


SHEET_OF = {"side": 8, "columns": 1, "images": [], "sha256": "0" * 64}
RESULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "model outside": (resealed(model="../.."), "result.json"),
    "world outside": (resealed(world="/etc"), "result.json"),
    "another model": (resealed(model="other"), "result.json"),
    "unsealed": (keys("result.json", model="other"), "result.json"),
    "a list": (replaced("result.json", "[]"), "result.json"),
    "NaN": (replaced("result.json", '{"schema_version": 2, "value": NaN}'), "result.json"),
    "deep": (replaced("result.json", "[" * 100_000), "result.json"),
    "huge number": (replaced("result.json", '{"schema_version": ' + "9" * 100_000 + "}"), "result.json"),
    "figures of text": (resealed(figures="x"), "result.json"),
    "run out of range": (
        lambda place: resealed(runs=[])(place),
        "result.json",
    ),
    "protocol out of range": (lambda place: resealed(protocols=[])(place), "result.json"),
    "sheet is missing": (resealed(sheet=SHEET_OF), SHEET),
    "training without step": (resealed(training={"a": 1}), "result.json"),
    "other rows": (other_rows, SAMPLES),
    "rows of text": (replaced(SAMPLES, "<script>"), SAMPLES),
    "rows are gone": (lambda place: (place / SAMPLES).unlink(), SAMPLES),
    "training log of text": (replaced(TRAINING, "<script>"), TRAINING),
    "training log outside": (linked(TRAINING), TRAINING),
    "rows are a folder": (lambda place: ((place / SAMPLES).unlink(), (place / SAMPLES).mkdir()), SAMPLES),
    "training log is a folder": (lambda place: ((place / TRAINING).unlink(), (place / TRAINING).mkdir()), TRAINING),
}
for name, (change, says) in RESULTS.items():
    case(f"results, {name}", results, result(change), says)


def old_images(*entries: Any) -> Make:
    """Pictures of a result of schema 1, which had them in files."""

    def make(folder: Path) -> None:
        shutil.copytree(ROOT / "tests/history/results_v1", folder / "results")
        place = next(iter((folder / "results").rglob("*@*.json"))).parent / "images"
        place.mkdir(exist_ok=True)
        (place / "index.json").write_text(json.dumps(entries[0] if len(entries) == 1 else entries))

    return make


case("old results, image outside", results, old_images([ENTRY | {"file": "../../../x.png"}]), "index.json")
case("old results, image of a list", results, old_images([ENTRY | {"file": ["a.png"]}]), "index.json")
case("old results, image without a prompt", results, old_images([{"file": "a.png"}]), "index.json")
case("old results, images of text", results, old_images("x"), "index.json")


# Runs


RUNS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "world outside": (keys("run.json", world="../../x"), "run.json"),
    "world absolute": (keys("run.json", world="/etc"), "run.json"),
    "method outside": (keys("run.json", method=".."), "run.json"),
    "teacher of text": (keys("run.json", teacher="x"), "run.json"),
    "teacher without a folder": (keys("run.json", teacher={"preset": None}), "run.json"),
    "rewards of numbers": (keys("run.json", rewards=[1]), "run.json"),
    "sampling of text": (keys("run.json", sampling="x"), "run.json"),
    "step of text": (keys("run.json", step="x", steps=None), "run.json"),
    "a list": (replaced("run.json", "[]"), "run.json"),
    "deep": (replaced("run.json", "[" * 100_000), "run.json"),
    "key twice": (replaced("run.json", '{"schema_version": 1, "schema_version": 1}'), "run.json"),
    "cost of text": (keys("run.json", cost={"wall_sec": "x"}), "run.json"),
    "seed of text": (keys("run.json", seed="../x"), "run.json"),
}
for name, (change, says) in RUNS.items():
    case(f"run, {name}", run, copied("run", change), says)


def manifest(**files: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        place = folder / "checkpoints" / "step-00000001"
        place.mkdir(parents=True)
        body = {"schema_version": 1, "step": 1, "files": files}
        whole = (json.dumps(body, indent=1) + "\n").encode()
        sealed = json.dumps({**body, "sha256": hashlib.sha256(whole).hexdigest()}, indent=1) + "\n"
        (place / "manifest.json").write_text(sealed)

    return change


CHECKPOINTS: dict[str, Callable[[Path], Any]] = {
    "file outside": manifest(**{"../../../x.safetensors": {"bytes": 1, "sha256": "0"}}),
    "file absolute": manifest(**{"/etc/passwd": {"bytes": 1, "sha256": "0"}}),
    "file missing": manifest(**{"meta.json": {"bytes": 1, "sha256": "0"}}),
    "sizes of text": manifest(**{"meta.json": 1}),
    "no file at all": manifest(),
}
for name, change in CHECKPOINTS.items():
    case(f"checkpoint, {name}", resumed, copied("run", change), "step-00000001", kind=CorruptCheckpoint)
case(
    "export, config of a python tag",
    exported,
    copied(
        "run",
        lambda folder: (
            commit(folder / "checkpoints", 1, {}, {"step": 1}),
            replaced("config.yaml", YAMLS["python tag"])(folder),
        ),
    ),
    "config.yaml",
)


@pytest.fixture
def place(tmp_path: Path, parts: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder with the hostile thing; everything around it stays as it is."""
    (tmp_path / "parts").symlink_to(parts)
    (tmp_path / "in").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "in")
    yield tmp_path / "in"


@pytest.mark.parametrize(("read", "make", "says", "kind"), CASES)
def test_hostile_things_are_refused_by_name(
    place: Path, read: Read, make: Make, says: str, kind: type[Exception]
) -> None:
    make(place)
    before = snapshot(place)
    with pytest.raises(kind) as caught:
        read(place)
    assert says in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert snapshot(place) == before, "nothing ran, and nothing was written"
    assert {path.name for path in place.parent.iterdir()} <= {"in", "parts", "cache"}


def harmless(folder: Path) -> None:
    """Names of code and of places outside, which nothing follows."""
    for part in ("pipeline", "reward"):
        shutil.copytree(folder.parent / "parts" / part, folder / part)
        for name in ("pipeline.py", "own.py", "unet.py", "__init__.py"):
            code(folder / part, name)
    keys("model_index.json", custom_pipeline="pipeline.py", unet=["pipeline", "Own"])(folder / "pipeline")
    keys(UNET, _name_or_path="../../../etc", custom="os.system")(folder / "pipeline")
    content = json.loads((folder / "reward/open_clip_config.json").read_text())
    content["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "../../../etc"
    (folder / "reward/open_clip_config.json").write_text(json.dumps(content))


def test_names_of_code_and_of_places_outside_change_nothing(place: Path, parts: Path) -> None:
    harmless(place)
    before = snapshot(place)
    found, wanted = (load_models(folder / "pipeline", CPU, torch.float32) for folder in (place, parts))
    assert torch.equal(found.encode_prompts(["a red circle"]), wanted.encode_prompts(["a red circle"]))
    assert all(torch.equal(a, b) for a, b in zip(found.unet.parameters(), wanted.unet.parameters(), strict=True))
    images = torch.rand(1, 3, 32, 32)
    ours, theirs = (HPSReward.load(folder / "reward", antialias=True, device="cpu") for folder in (place, parts))
    assert torch.equal(ours(images, ["a red circle"]), theirs(images, ["a red circle"]))
    assert snapshot(place) == before


@pytest.mark.parametrize(
    ("make", "words", "says"),
    [
        (text("x.yaml", YAMLS["python tag"]), ("train", "x.yaml"), "x.yaml:1"),
        (text("x.yaml", YAMLS["python tag"]), ("validate", "x.yaml"), "x.yaml:1"),
        (copied("run", keys("run.json", world="../..")), ("eval", "run"), "run.json"),
        (
            copied("pipeline", keys("model_index.json", _class_name="os.system")),
            ("eval", "pipeline"),
            "model_index.json",
        ),
        (result(other_rows), ("report", "results"), SAMPLES),
        (result(resealed(model="../..")), ("verdict", "results"), "result.json"),
        (adapter("adapter_model.safetensors", None), ("eval", "--base", "benchtop", "--lora", "lora"), "adapter_model"),
        (pickled("unet.bin"), ("eval", "--base", "benchtop", "--unet", "unet.bin"), "unet.bin"),
        (text("x.jsonl", PROMPTS["NaN"][1]), ("eval", "teacher", "--prompts", "x.jsonl"), "x.jsonl"),
        (image(lambda: png_claiming(60_000, 60_000)), ("eval", "images"), "a.png"),
        (copied("run", replaced("run.json", "[" * 100_000)), ("show", "run"), "run.json"),
        (copied("run", manifest()), ("export", "run"), "manifest.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_the_command_line_says_so_in_one_line(
    place: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, make: Make, words: tuple[str, ...], says: str
) -> None:
    make(place)
    before = snapshot(place)
    monkeypatch.chdir(place)
    done = cli(*words)
    assert done.returncode == (1 if words[0] == "export" else 2), done.stderr
    assert says in done.stderr and "Traceback" not in done.stderr and done.stderr.count("error: ") == 1
    assert snapshot(place) == before


def test_the_corpus_is_whole() -> None:
    assert len(CASES) >= 150
