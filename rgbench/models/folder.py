"""Pipeline folders of diffusers: their weight files, configurations and hashes, without torch.

Weights may be plain (``model.safetensors``), of a variant (``model.fp16.safetensors``) or in shards with an index; a
component is loaded from its plain file where it has one, else from its only variant.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rgbench.core.errors import UsageError
from rgbench.core.io import check_sums, is_folder_name, read_json, refuse_code, sha256_once, sha256_tree

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
CONFIGS = (*(f"{component}/config.json" for component in STEMS), "scheduler/scheduler_config.json")
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))  # either of the two layouts
CONSTANT = "position_ids"  # end of the name of a tensor in older files, whose values are always 0, 1, 2 …
PIPELINES = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline")
INDEX = "model_index.json"
DENOISERS = ("unet", "transformer")
FLUX_LATENTS = 128  # side that FluxPipeline makes, whose transformer does not say it
SAFETY = "safety_checker"  # a part of pipelines that is not loaded
# What diffusers, transformers and open_clip raise on configurations and weights that do not fit, besides their own.
_LOADING_ERRORS = (
    *(OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, ArithmeticError),
    *(AssertionError, MemoryError),
)
_PART_CONFIGS = ("config.json", "scheduler_config.json")  # of networks and schedulers; other parts are hashed whole
_VARIANT = r"(?:\.(?P<variant>[A-Za-z0-9_]+?))?"


@dataclass(frozen=True)
class Weights:
    """The weight files of one component.

    Attributes:
        folder: of the component.
        component: such as ``unet``, ``vae`` or ``text_encoder``.
        variant: like ``fp16``; None for the plain files.
        files: the safetensors files, sorted; more than one where they are shards, none for a configuration alone.
    """

    folder: Path
    component: str
    variant: str | None
    files: tuple[Path, ...]


def check_folder(folder: Path, weights: bool = True) -> dict[str, Weights]:
    """Find the weights of a folder of the Stable Diffusion family.

    Args:
        folder: of the pipeline.
        weights: False where configurations are enough.

    Returns:
        component → its weight files.

    Raises:
        UsageError: a file is missing or damaged, or it is another family's folder.
    """
    if not is_stable_diffusion(folder):
        name = read_config(folder / INDEX).get("_class_name")
        raise UsageError(
            f"{folder / INDEX}: a {name}; here the Stable Diffusion family is needed ({', '.join(PIPELINES)})"
        )
    for name in CONFIGS:
        if not (folder / name).is_file():
            raise UsageError(f"{folder / name}: missing; a diffusers pipeline folder has it")
    if not weights:
        _check_networks(folder)
        return {component: Weights(folder / component, component, None, ()) for component in STEMS}
    check_sums(folder)
    found = {component: find_weights(folder / component, component) for component in STEMS}
    if absent := missing_parts(folder):
        raise UsageError(f"{folder}: {', '.join(absent)} missing; a diffusers pipeline folder has a tokenizer")
    _check_networks(folder)
    return found


def is_stable_diffusion(folder: Path) -> bool:
    """Whether a folder is of the family that rgbench samples itself: SD1.x, SD2.x and their students."""
    index = folder / INDEX
    return not index.is_file() or read_config(index).get("_class_name") in PIPELINES


def model_index(folder: Path) -> dict[str, Any]:
    """The pipeline's class name, ``_class_name``, and [library, class] of each part that it has.

    Raises:
        UsageError: not diffusers' own format; a class or library that is code of the folder.
    """
    file = folder / INDEX
    content = read_config(file)
    name = content.get("_class_name")
    if not isinstance(name, str) or not name.isidentifier():
        raise UsageError(f"{file}: _class_name {name!r:.80} names no class of diffusers; code of a folder is not run")
    lists = {key: value for key, value in content.items() if isinstance(value, list) and not key.startswith("_")}
    parts = {key: value for key, value in lists.items() if len(value) == 2 and value[0]}
    for key, value in parts.items():
        if not is_folder_name(key) or not all(isinstance(each, str) and each.isidentifier() for each in value):
            raise UsageError(f"{file}: {key[:80]!r}: {value!r:.80} names no class; fetch or write the folder again")
        if (folder / key / f"{value[0]}.py").exists():
            raise UsageError(f"{file}: {key} is code of the folder, which is not run; use a class of diffusers")
    return {"_class_name": name, **parts}


def left_out(folder: Path) -> dict[str, None]:
    """Parts that a pipeline's index says are left out, such as SD3's T5, which diffusers wants to be told of."""
    content = read_config(folder / INDEX)
    return {key: None for key, value in content.items() if value == [None, None] and key != SAFETY}


def check_pipeline(folder: Path, weights: bool = True) -> dict[str, Weights]:
    """Find the parts of any diffusers pipeline.

    Args:
        folder: of the pipeline.
        weights: False where configurations are enough.

    Returns:
        network → its weight files, without the safety checker.

    Raises:
        UsageError: a part that ``model_index.json`` names is missing, or its weights are; one that asks for code.
    """
    index = model_index(folder)
    parts = {key: value for key, value in index.items() if key not in ("_class_name", SAFETY)}
    if absent := [key for key in parts if not (folder / key).is_dir()]:
        raise UsageError(
            f"{folder}: lacks {', '.join(absent)}, which {INDEX} names; fetch or write the folder again (of a hub "
            "repository, every file: hf download OWNER/NAME; a gated one needs its licence accepted and hf auth login)"
        )
    refuse_code(folder)
    networks = [key for key in parts if (folder / key / "config.json").is_file()]
    if not weights:
        return {key: Weights(folder / key, key, None, ()) for key in networks}
    return {key: find_weights(folder / key, key, _stem(parts[key][0])) for key in networks}


def _stem(library: str) -> str:
    return STEMS["text_encoder" if library == "transformers" else "unet"]


def find_encoders(folder: Path) -> tuple[dict[str, Weights], list[str]]:
    """What encodes images and prompts in a pipeline folder: networks with their weights, and tokenizers."""
    if is_stable_diffusion(folder):
        return {part: find_weights(folder / part, part) for part in ("vae", "text_encoder")}, ["tokenizer"]
    found = {key: value for key, value in check_pipeline(folder).items() if key not in DENOISERS}
    return found, [key for key in model_index(folder) if key.startswith("tokenizer")]


def missing_parts(folder: Path, files: Iterable[str] = ()) -> list[str]:
    """Relative names of what a pipeline folder lacks; empty where it can be loaded.

    Args:
        folder: of the pipeline.
        files: that a family other than Stable Diffusion 1 and 2 needs; weights may be there in half precision.
    """
    if not is_stable_diffusion(folder):
        halves = {name: name.replace(".safetensors", ".fp16.safetensors") for name in files}
        return [name for name, half in halves.items() if not any((folder / n).is_file() for n in (name, half))]
    absent = [name for name in CONFIGS if not (folder / name).is_file()]
    if not any(all((folder / "tokenizer" / name).is_file() for name in names) for names in TOKENIZERS):
        absent += [f"tokenizer/{name}" for name in TOKENIZERS[1]]
    for component, stem in STEMS.items():
        try:
            find_weights(folder / component, component)
        except UsageError:
            absent.append(f"{component}/{stem}.safetensors")
    return absent


def find_weights(folder: Path, component: str, stem: str | None = None) -> Weights:
    """Find the weight files that a component is loaded from.

    Args:
        folder: of the component, such as ``pipeline/unet``.
        component: its name in the pipeline.
        stem: of its files' names; by default that of ``unet``, ``vae`` or ``text_encoder``.

    Raises:
        UsageError: none there, a shard missing, or several variants and no plain file.
    """
    stem = stem or STEMS[component]
    found = _variants(folder, stem)
    expected = folder / f"{stem}.safetensors"
    if not found:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        why = f" ({pickled[0]} is a pickle, which is not opened; convert it to safetensors)" if pickled else ""
        raise UsageError(f"{expected}: missing; a diffusers folder with safetensors weights is needed{why}")
    variant = None if None in found else min(str(name) for name in found)
    if variant and len(found) > 1:
        raise UsageError(
            f"{expected}: missing, and there are several variants ({', '.join(map(str, found))}); keep one"
        )
    for file in found[variant]:
        if not file.is_file():
            raise UsageError(f"{file}: missing; the index beside it names this shard. Fetch or write the folder again")
    return Weights(folder, component, variant, found[variant])


def read_config(file: Path) -> dict[str, Any]:
    """Read a component's configuration.

    Raises:
        UsageError: missing, not JSON, or no mapping.
    """
    content = read_json(file)
    if not isinstance(content, dict):
        raise UsageError(f"{file}: not a configuration; fetch or write the folder again")
    return content


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the libraries raise on a folder or file into a UsageError, and keep their log lines off the terminal.

    Raises:
        UsageError: names the path and the library's first line.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        with quiet_libraries():
            yield
    except (*_LOADING_ERRORS, SafetensorError, StrictDataclassError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(f"{path}: cannot be loaded ({lines[0]}); fetch or write it again") from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep log lines and deprecation notes of diffusers and transformers off the terminal."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def diffusers_notes() -> Iterator[list[str]]:
    """What diffusers logs in the block, in place of its own handlers."""
    logger, notes = logging.getLogger("diffusers"), _Notes()
    handlers, level, propagate = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.propagate = [notes], False
    logger.setLevel(logging.INFO)
    try:
        yield notes.texts
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


class _Notes(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def read_number(config: Mapping[str, Any], key: str, default: float | None, file: Path) -> Any:
    """A number of a configuration; the default where the key is missing.

    Raises:
        UsageError: it is not a positive, finite number.
    """
    value = config.get(key, default)
    if value is not default and (type(value) not in (int, float) or not 0 < value < math.inf):
        raise UsageError(f"{file}: {key} {value!r:.80} is not a positive number; fetch or write the folder again")
    return value


def image_side(folder: Path) -> int:
    """Image side in pixels of a pipeline folder.

    Raises:
        UsageError: its configurations are missing, or do not say.
    """
    component = next((name for name in DENOISERS if (folder / name).is_dir()), DENOISERS[0])
    file = folder / component / "config.json"
    latent = read_config(file).get("sample_size", None if component == "unet" else FLUX_LATENTS)
    blocks = read_config(folder / "vae" / "config.json").get("block_out_channels")
    if type(latent) is not int or latent < 1 or not isinstance(blocks, list):
        raise UsageError(f"{file}: sample_size {latent!r:.80}; use a model of square images")
    return latent * 2 ** (len(blocks) - 1)


def check_class(folder: Path, component: str) -> None:
    """Check that a component's configuration names the class that rgbench loads.

    Raises:
        UsageError: another class, such as a VAE of another kind; or no configuration.
    """
    file, wanted = folder / "config.json", CLASSES[component]
    if not file.is_file():
        raise UsageError(f"{file}: missing; give a folder in diffusers' layout")
    config = read_config(file)
    names = config.get("architectures") or [config.get("_class_name", wanted)]
    if wanted not in names:
        raise UsageError(f"{file}: of class {names[0]}; rgbench loads {wanted} as {component}")


def check_loaded(folder: Path, info: Mapping[str, Any]) -> None:
    """Account for every tensor of a network that diffusers or transformers loaded.

    Args:
        folder: of the weights.
        info: what ``from_pretrained`` says with ``output_loading_info``.

    Raises:
        UsageError: a tensor of the network is in no file, has another shape there, or one of the files goes nowhere:
            names how many and the first.
    """
    faults = {
        "missing from the files": info["missing_keys"],
        "of the files unknown to this network": info["unexpected_keys"],
        "of the files of another shape than its configuration says": [key[0] for key in info["mismatched_keys"]],
    }
    for fault, keys in faults.items():
        if keys:
            raise UsageError(f"{folder}: {len(keys)} tensors {fault}, first {min(keys)!r}; fetch or write it again")


def weights_sha256(folder: Path) -> str:
    """:func:`hash_weights` of a pipeline folder."""
    if not is_stable_diffusion(folder):
        return hash_weights(check_pipeline(folder))
    return hash_weights({component: find_weights(folder / component, component) for component in STEMS})


def hash_weights(weights: Mapping[str, Weights]) -> str:
    """One hash over the names and contents of weight files; other files change nothing.

    A file that has not changed since this process hashed it is not read again.
    """
    digest = hashlib.sha256()
    for component, found in weights.items():
        for file in found.files:
            digest.update(f"{component}/{file.name} {sha256_once(file)}\n".encode())
    return digest.hexdigest()


def config_sha256(folder: Path) -> str:
    """One hash over what else decides a pipeline's images; see :func:`config_hashes`."""
    return hashlib.sha256(json.dumps(config_hashes(folder), sort_keys=True).encode()).hexdigest()


def config_hashes(folder: Path) -> dict[str, str]:
    """Hashes of what else decides a folder's outputs: its configurations, with the noise schedule, and its tokenizer.

    Fields that name a library's version or a path, with a leading underscore, are left out.
    """
    if is_stable_diffusion(folder):
        hashes = {name.partition("/")[0]: config_hash(folder / name) for name in CONFIGS}
        return {"tokenizer": sha256_tree(folder / "tokenizer"), **hashes}
    hashes = {"": config_hash(folder / INDEX)}
    for key in (key for key in model_index(folder) if key not in ("_class_name", SAFETY)):
        file = next((folder / key / name for name in _PART_CONFIGS if (folder / key / name).is_file()), None)
        hashes[key] = sha256_tree(folder / key) if file is None else config_hash(file)
    return hashes


def config_hash(file: Path) -> str:
    """Hash of one configuration, without the fields that :func:`config_hashes` leaves out."""
    content = {k: v for k, v in read_config(file).items() if k == "_class_name" or not k.startswith("_")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _variants(folder: Path, stem: str) -> dict[str | None, tuple[Path, ...]]:
    """Variants of a component and their files; shards are those that their index names."""
    whole = re.compile(rf"{stem}{_VARIANT}\.safetensors")
    index = re.compile(rf"{stem}\.safetensors\.index{_VARIANT}\.json")
    found: dict[str | None, tuple[Path, ...]] = {}
    for path in sorted(folder.glob(f"{stem}*")):
        match = whole.fullmatch(path.name) or index.fullmatch(path.name)
        if match is None:
            continue
        if match["variant"] in found:
            raise UsageError(f"{path}: {found[match['variant']][0].name} is there as well; keep the file or the shards")
        found[match["variant"]] = _shards(path) if path.suffix == ".json" else (path,)
    return found


def _shards(index: Path) -> tuple[Path, ...]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UsageError(f"{index}: weight_map does not name files beside it; fetch or write the folder again")
    return tuple(index.parent / name for name in sorted(set(names)))


def check_vae(file: Path, shifted: bool) -> None:
    """Refuse an autoencoder whose latents are normalised otherwise than diffusers does for the family.

    Args:
        file: its configuration.
        shifted: whether the family adds ``shift_factor``; others pass over it.

    Raises:
        UsageError: names the key.
    """
    config, remedy = read_config(file), "use the VAE of the model"
    read_number(config, "scaling_factor", 0.18215, file)
    for key in ("latents_mean", "latents_std"):
        if config.get(key) is not None:
            raise UsageError(f"{file}: {key} is set, which is not decoded with here; {remedy}")
    shift = config.get("shift_factor")
    if shifted and type(shift) not in (int, float):
        raise UsageError(f"{file}: shift_factor {shift!r:.80} is not a number; {remedy}")
    if not shifted and shift not in (None, 0):
        raise UsageError(f"{file}: shift_factor {shift!r:.80}, which this family's pipeline passes over; {remedy}")


def _check_networks(folder: Path) -> None:
    """Refuse UNets that read more than latents, time and text: inpainting, upscaling, SDXL, unCLIP."""
    for component in STEMS:
        check_class(folder / component, component)
    file = folder / "unet" / "config.json"
    unet, vae = read_config(file), read_config(folder / "vae" / "config.json")
    channels = vae.get("latent_channels", 4)
    check_vae(folder / "vae" / "config.json", shifted=False)
    if unet.get("in_channels", 4) != channels:
        raise UsageError(
            f"{file}: in_channels {unet.get('in_channels')}, the VAE's latents have {channels}: not a text-to-image "
            "model"
        )
    for key in ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
        if unet.get(key) is not None:
            raise UsageError(
                f"{file}: {key} {unet[key]!r}: a UNet that is conditioned on more than text; use SD1.x or SD2.x"
            )
    image_side(folder)
