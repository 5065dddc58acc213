"""LoRA files, merged into a base model: W' = W + (α / r) B A (arXiv 2106.09685; rank-stabilised: α / √r).

| layout | names of tensors | α |
|---|---|---|
| diffusers | ``unet.…to_q.lora_A.weight``, ``text_encoder.…``; older: ``….processor.to_q_lora.down.weight`` | header |
| peft | ``base_model.model.…to_q.lora_A.weight`` in a folder with ``adapter_config.json`` | that file |
| Kohya | ``lora_unet_…_to_q.lora_down.weight``, ``lora_te_…`` | a tensor ``.alpha`` for each layer |

The denoising network may be a ``unet`` or a ``transformer``; of several text encoders, Kohya's are ``lora_te1_``,
``lora_te2_``. Names of other trainers' networks (SDXL's original blocks, FLUX' fused attention) are read by diffusers.
Where nothing says α, it is r, as in diffusers. Every tensor goes into a weight at the file's scale, or the file is
refused with the first name at fault.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rgbench.core.errors import UsageError
from rgbench.core.io import check_sums, load_safetensors, parse_json, read_json, read_safetensors_metadata
from rgbench.models.folder import DENOISERS

DIFFUSERS_FILE, PEFT_FILE = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
PEFT_CONFIG, PEFT_PREFIX = "adapter_config.json", "base_model.model."
EMBEDDING_FILE = "guidance_embedding.safetensors"  # rgbench's export of a student with one, beside its adapters
HEADER_KEY = "lora_adapter_metadata"  # of diffusers
KOHYA_KEYS = ("ss_network_alpha", "ss_network_dim")  # likewise of Kohya's trainer, which writes alpha as tensors too
_TENSOR = re.compile(
    r"(?P<layer>.+?)(?:\.lora_(?P<letter>[AB])\.weight|\.lora_(?P<kohya>down|up)\.weight"
    r"|[._]lora(?:_linear_layer)?\.(?P<old>down|up)\.weight|\.(?P<alpha>alpha))"
)
_DOWN, _UP, _ALPHA = "down", "up", "alpha"
_MAGNITUDES = ("dora_scale", "lora_magnitude_vector")
# Fields of peft's configuration that may have any value: what they ask for shows in the tensors, or not in the product.
_HARMLESS = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "bias", "use_rslora"),
    *("modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern"),
    *("alpha_pattern", "megatron_config", "megatron_core", "trainable_token_indices", "loftq_config", "eva_config"),
    *("corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "runtime_config", "lora_bias"),
    *("ensure_weight_tying", "layer_replication"),
}
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # others change the base's weights too
_TEXT_ALIASES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}  # of older diffusers files

NUM_NAMED = 3  # tensors in a message

Place = tuple[str, str]  # the name of a network, such as "unet" or "text_encoder", and a layer's name in it
Converter = Callable[[Path], dict[str, Tensor]]

log = logging.getLogger(__name__)


@dataclass
class _Layer:
    """The tensors of one adapted layer, by part, with their names in the file."""

    place: Place
    tensors: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


def merge_lora(
    path: Path, networks: Mapping[str, nn.Module], weight: float = 1.0, convert: Converter | None = None
) -> None:
    """Add a LoRA to the weights of its base model, in place.

    Args:
        path: a file of one of the layouts above, or its folder.
        networks: of the base by name: one of :data:`DENOISERS`, and text encoders.
        weight: factor of the file's own scale.
        convert: reads a file of other names as tensors of diffusers' names; None where nothing does.

    Raises:
        UsageError: no such file, or a damaged one; tensors of another layout, kind (DoRA, LoHa, LoKr …), base or
            shape; a scale that nothing or two places give.
    """
    file = find_adapter(path)
    check_sums(file.parent)
    layers = _read_layers(file, networks, convert)
    configs = _read_configs(file, layers, networks)
    for layer in layers:  # all before the first is added; the products of all would need the memory of the model
        _product(file, layer, networks), _scale(file, layer, configs)
    for layer in layers:
        part, name = layer.place
        own: Any = networks[part].get_submodule(name).weight
        product, scale = _product(file, layer, networks), weight * _scale(file, layer, configs)
        own.data = (own.data.float() + scale * product.to(own.device)).to(own.dtype)


def find_adapter(path: Path) -> Path:
    """The LoRA's weight file.

    Raises:
        UsageError: nothing there, or a folder with several.
    """
    if path.is_file():
        return path
    known = [path / name for name in (DIFFUSERS_FILE, PEFT_FILE) if (path / name).is_file()]
    found = known or [file for file in sorted(path.glob("*.safetensors")) if file.name != EMBEDDING_FILE]
    if not found:
        raise UsageError(f"{path}: no such LoRA; give a .safetensors file or its folder")
    if len(found) > 1:
        raise UsageError(f"{path}: several weight files ({', '.join(file.name for file in found)}); name one")
    return found[0]


def adapter_files(path: Path) -> list[Path]:
    """All files that decide the merged weights: tensors, peft's configuration, rgbench's guidance embedding."""
    file = find_adapter(path)
    return [each for each in (file, *map(file.with_name, (PEFT_CONFIG, EMBEDDING_FILE))) if each.is_file()]


def _read_layers(file: Path, networks: Mapping[str, nn.Module], convert: Converter | None) -> list[_Layer]:
    """All tensors of a file, by the layer that they adapt."""
    state = load_safetensors(file)
    places = {alias: place for alias, place in _aliases(networks)}
    if convert is not None and not any(word in name for name in state for word in _MAGNITUDES):
        matches = [_TENSOR.fullmatch(name) for name in state]
        if any(match is None or match["layer"] not in places for match in matches):
            state = _converted(file, state, convert)
    layers: dict[Place, _Layer] = {}
    unknown = []
    for name, tensor in state.items():
        match = _TENSOR.fullmatch(name)
        place = places.get(match["layer"]) if match else None
        if match is None or place is None:
            unknown.append(name)
            continue
        part = match["kohya"] or match["old"] or match["alpha"] or {"A": _DOWN, "B": _UP}[match["letter"]]
        layer = layers.setdefault(place, _Layer(place))
        if part in layer.tensors:
            raise UsageError(f"{file}: {layer.names[part]!r} and {name!r} are one tensor; keep one")
        layer.tensors[part], layer.names[part] = tensor, name
    if magnitudes := [name for name in unknown if any(word in name for word in _MAGNITUDES)]:
        raise UsageError(
            f"{file}: holds {len(magnitudes)} DoRA magnitudes, first {magnitudes[0]!r}, which are not applied here; "
            "merge them into a whole UNet and give it with --unet"
        )
    if unknown or not layers:
        raise _foreign(file, unknown, len(state), networks)
    with_alpha = [layer for layer in layers.values() if _ALPHA in layer.tensors]
    if with_alpha and len(with_alpha) < len(layers):
        name = next(name for layer in layers.values() if _ALPHA not in layer.names for name in layer.names.values())
        raise UsageError(f"{file}: {name!r} lacks its alpha, which other layers have; fetch it again")
    for layer in layers.values():
        if lacking := {_DOWN, _UP} - layer.tensors.keys():
            name = next(iter(layer.names.values()))
            raise UsageError(f"{file}: {name!r} lacks its {'lora_A' if _DOWN in lacking else 'lora_B'}; fetch it again")
    return list(layers.values())


def _foreign(file: Path, unknown: Sequence[str], num: int, networks: Mapping[str, nn.Module]) -> UsageError:
    """The error that names tensors which fit nowhere."""
    listed = ", ".join(map(repr, unknown[:NUM_NAMED]))
    first = f", first {listed}" if unknown else ""
    return UsageError(
        f"{file}: {len(unknown)} of {num} tensors are no LoRA of the base's {', '.join(networks)}{first}; name the "
        "base it was trained from, and a LoRA of diffusers', peft's or Kohya's layout"
    )


def _converted(file: Path, state: Mapping[str, Tensor], convert: Converter) -> dict[str, Tensor]:
    """The file's tensors under diffusers' names; as they are where its reader does not know them either.

    Raises:
        UsageError: it leaves out a text encoder's.
    """
    try:
        found = convert(file)
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, RuntimeError, NotImplementedError) as error:
        log.info("%s: diffusers does not read it either (%s)", file, error)
        return dict(state)
    of_text = [name for name in state if name.startswith("lora_te") and not name.endswith(f".{_ALPHA}")]
    if len(of_text) > sum(name.startswith("text_encoder") and not name.endswith(f".{_ALPHA}") for name in found):
        raise UsageError(
            f"{file}: diffusers reads a part of it alone (not {of_text[-1]!r}); give a LoRA without the rest"
        )
    return found


def _aliases(networks: Mapping[str, nn.Module]) -> Iterator[tuple[str, Place]]:
    """All names that files give a layer that can be adapted."""
    for part, network in networks.items():
        dotted, kohya = _prefixes(part)
        for name, module in network.named_modules():
            if not isinstance(module, (nn.Linear, nn.Conv2d)):
                continue
            for spelling in _spellings(part, name):
                for prefix in dotted:
                    yield prefix + spelling, (part, name)
                for prefix in kohya:
                    yield prefix + spelling.replace(".", "_"), (part, name)


def _prefixes(part: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What stands before a network's names in dotted and in Kohya's layout; peft's names only the first of a kind."""
    if part in DENOISERS:
        return (f"{part}.", "", PEFT_PREFIX), ("lora_unet_",)
    if part == "text_encoder":
        return ("text_encoder.", PEFT_PREFIX), ("lora_te_", "lora_te1_")
    return (f"{part}.",), (f"lora_te{part.rpartition('_')[2]}_",)


def _spellings(part: str, name: str) -> set[str]:
    """A layer's own name and those of older versions of diffusers and transformers."""
    head, _, last = name.rpartition(".")
    if part in DENOISERS:
        old = name.removesuffix(".0") if name.endswith(".to_out.0") else name
        head, _, last = old.rpartition(".")
        return {name, old, f"{head}.processor.{last}"} if ".attn" in name else {name}
    names = {name, f"{head}.{_TEXT_ALIASES.get(last, last)}"}
    plain = {each.removeprefix("text_model.") for each in names}
    return plain | {f"text_model.{each}" for each in plain}


def _read_configs(file: Path, layers: Sequence[_Layer], networks: Mapping[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """peft's configuration for each part of the model, from the file beside or the header; empty without one."""
    if any(name.startswith(PEFT_PREFIX) for layer in layers for name in layer.names.values()):
        config = read_json(file.with_name(PEFT_CONFIG))
        if not isinstance(config, dict):
            raise UsageError(f"{file.with_name(PEFT_CONFIG)}: not a configuration of peft")
        return dict.fromkeys(networks, config)
    metadata = read_safetensors_metadata(file)
    header = metadata.get(HEADER_KEY)
    if header is None:
        if not any(_ALPHA in layer.tensors for layer in layers):
            _refuse_unused_scales(file, metadata)
        return {}
    try:
        values = parse_json(header).items()
    except (ValueError, AttributeError, RecursionError) as error:
        raise UsageError(f"{file}: its header's {HEADER_KEY} is damaged ({error})") from error
    configs: dict[str, dict[str, Any]] = {part: {} for part in networks}
    for key, value in values:
        part, _, name = key.partition(".")
        if part not in configs:
            raise UsageError(f"{file}: its header's {HEADER_KEY} has {key!r}, a part that the base model lacks")
        configs[part][name] = value
    return configs


def _refuse_unused_scales(file: Path, metadata: Mapping[str, str]) -> None:
    """Refuse a file whose scale would be 1, though a place that is not read for it says another."""
    if file.with_name(PEFT_CONFIG).is_file():
        raise UsageError(
            f"{file}: {PEFT_CONFIG} is beside it, whose scale is of names that begin with {PEFT_PREFIX!r}; remove the "
            "one that is not this LoRA's"
        )
    alpha, rank = (metadata.get(key) for key in KOHYA_KEYS)
    if alpha is not None and alpha.removesuffix(".0") != (rank or "").removesuffix(".0"):
        raise UsageError(f"{file}: {KOHYA_KEYS[0]} {alpha:.80} in its header, and no tensor has it; fetch it again")


def _scale(file: Path, layer: _Layer, configs: Mapping[str, dict[str, Any]]) -> float:
    """α / r of a layer."""
    part, name = layer.place
    rank = layer.tensors[_DOWN].shape[0]
    alpha = layer.tensors.get(_ALPHA)
    if alpha is not None:
        if configs or alpha.numel() != 1 or not math.isfinite(alpha.item()):
            why = "and its configuration both give a scale" if configs else "is not one finite number"
            raise UsageError(f"{file}: {layer.names[_ALPHA]!r} {why}")
        return float(alpha) / rank
    if not configs:
        return 1.0
    config = configs[part]
    where = f"{file}: the adapter's configuration of {part}"
    other = sorted(key for key, value in config.items() if value and key not in _HARMLESS)
    if config.get("peft_type") not in (None, "LORA") or other:
        raise UsageError(f"{where} is not a plain LoRA ({', '.join(other[:NUM_NAMED]) or config['peft_type']})")
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS or config.get("layer_replication"):
        raise UsageError(f"{where} changes the base's weights (init_lora_weights, layer_replication); convert it first")
    r = _of_layer(config, "rank_pattern", "r", name, where)
    alpha_value = _of_layer(config, "alpha_pattern", "lora_alpha", name, where)
    if r != rank:
        raise UsageError(f"{where} gives {name} rank {r}, its tensors have {rank}")
    return alpha_value / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_layer(config: Mapping[str, Any], patterns: str, key: str, name: str, where: str) -> float:
    """A layer's rank or α: of the pattern that its name ends with, else the configuration's own."""
    given = config.get(patterns) or {}
    if not isinstance(given, dict) or any(re.search(r"[^\w.]", pattern) for pattern in given):
        raise UsageError(f"{where}: {patterns} is not a mapping of names of layers")
    full = f"text_model.{name}"  # transformers before 5 names a text encoder's layers so
    value = next((v for p, v in given.items() if name == p or full == p or name.endswith(f".{p}")), config.get(key))
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UsageError(f"{where} gives no {key} for {name}")
    return value


def _product(file: Path, layer: _Layer, networks: Mapping[str, nn.Module]) -> Tensor:
    """B A in float32, of the weight's shape."""
    part, name = layer.place
    weight: Any = networks[part].get_submodule(name).weight
    for key in (_DOWN, _UP):
        if not layer.tensors[key].is_floating_point():
            raise UsageError(
                f"{file}: {layer.names[key]!r} is of {layer.tensors[key].dtype}: quantised; give plain weights"
            )
    down, up = (layer.tensors[key].float() for key in (_DOWN, _UP))
    rank, *inputs = down.shape
    outputs, *inner = up.shape
    fits = (outputs, *inputs) == tuple(weight.shape) and inner == [rank, *[1] * (weight.ndim - 2)]
    if not fits or not rank:
        raise UsageError(
            f"{file}: {layer.names[_UP]!r} {tuple(up.shape)} and {layer.names[_DOWN]!r} {tuple(down.shape)} do not fit "
            f"the base's weight {tuple(weight.shape)}; name the base it was trained from"
        )
    product = (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    if not torch.isfinite(product).all():
        raise UsageError(f"{file}: {layer.names[_DOWN]!r}: not finite")
    return product
