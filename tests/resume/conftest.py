"""What a user has on disk, for the tests that go through ``train()`` and the command line."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from PIL import Image
from safetensors.torch import save_file

from tests.parity import tiny


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A teacher, a reward, a proxy and an image folder on disk, as a user has them."""
    root = tmp_path_factory.mktemp("world")
    tiny.save_pipeline(root / "teacher")
    tiny.proxy().save(root / "proxy")
    expert = tiny.expert()
    vision = {"image_size": 8, "layers": 2, "width": 16, "head_width": 8, "patch_size": 4}
    text = {**tiny.TEXT_CFG, "hf_tokenizer_name": "."}
    (root / "reward").mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny.CLIP_FOLDER / file, root / "reward" / file)
    config = {"model_cfg": {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (root / "reward" / "open_clip_config.json").write_text(json.dumps(config))
    save_file(expert.model.state_dict(), root / "reward" / "open_clip_model.safetensors")
    (root / "images").mkdir()
    batch = tiny.TinySource().load(list(range(10)))
    for i, (image, prompt) in enumerate(zip(batch.images_BCHW, batch.prompts, strict=True)):
        pixels = (image * 255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(root / "images" / f"{i}.png")
        (root / "images" / f"{i}.txt").write_text(prompt)
    return root


@pytest.fixture
def recipe(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = tiny.recipe().model_dump(mode="json")
    values["model"] = {"path": str(world / "teacher")}
    values["data"] = {"kind": "image_folder", "path": str(world / "images"), "resolution": 16}
    values["reward"]["path"], values["proxy"]["path"] = str(world / "reward"), str(world / "proxy")
    values["train"] |= {"steps": 3, "save_every": 2, "sample_every": 2}
    values["lcd"] |= {"num_ddim_timesteps": 25, "timestep_scaling": 7.0}
    values["sampling"] |= {"guidance_scale": 4.0, "steps": 2}
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(values))
    return file
