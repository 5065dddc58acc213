"""Any text-to-image pipeline of diffusers, sampled through its own ``__call__``: SDXL, SD3, FLUX, PixArt, Sana, Qwen …

Scheduler, steps, guidance and sizes are the pipeline's unless they are given. Each image has its own CPU generator.
Some pipelines do not pass it to a scheduler that draws noise (FLUX with ``FlowMatchLCMScheduler``): it is passed here.
A pipeline that still draws from torch's global generator is refused, because its images would depend on their batch.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from torch import Tensor, nn

from rgbench.core.errors import UsageError, suggest
from rgbench.core.io import sha256_file
from rgbench.core.process import lacks_memory
from rgbench.diffusion.sampling import flow_grid
from rgbench.models.folder import (
    SAFETY,
    check_pipeline,
    config_sha256,
    diffusers_notes,
    explained,
    hash_weights,
    left_out,
    model_index,
    quiet_libraries,
)
from rgbench.models.lora import EMBEDDING_FILE, adapter_files, find_adapter, merge_lora
from rgbench.models.pipeline import STEPS_KEY, load_part

RESERVED = {
    **dict.fromkeys(("prompt", "generator", "latents", "num_images_per_prompt"), "is set by rgbench"),
    **dict.fromkeys(("output_type", "return_dict"), "is set by rgbench"),
    "num_inference_steps": "is --steps",
    "denoising_end": "leaves images unfinished",
    "guidance_scale": "is --guidance",
    "true_cfg_scale": "is --guidance",
}
# Arguments of pipelines that need more than a prompt, or make something else than one image.
OTHER_TASKS = {
    "mask_image": "an inpainting pipeline",
    "num_frames": "a video pipeline",
    "video": "a video pipeline",
    "video_length": "a video pipeline",
    "audio": "an audio pipeline",
    "audio_length_in_s": "an audio pipeline",
    "audio_end_in_s": "an audio pipeline",
    "control_image": "a ControlNet pipeline",
    "controlnet_conditioning_scale": "a ControlNet pipeline",
    "image_embeds": "a decoder of image embeddings",
}
SAMPLERS = {"ddim": "DDIMScheduler", "lcm": "LCMScheduler", "tcd": "TCDScheduler"}
FLOW_SAMPLERS = {"lcm": "FlowMatchLCMScheduler"}
CLEANERS = ("bs4", "ftfy")  # what clean_caption needs
GRIDS = ("timesteps", "sigmas")  # arguments that name the steps one by one
_ONE_TEXT = re.compile(r"(negative_)?prompt(_\d+)?")
_ALPHA = re.compile(r"[._]lora(_linear_layer)?\.down\.weight\.alpha$")
_DROPPED = re.compile("filter|[Uu]nsupported keys")  # in what diffusers logs of tensors that it leaves out
MAX_TOKENS = 10**6  # tokenizers without a limit give one above

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CallOptions:
    """What is changed of a pipeline's own defaults.

    Attributes:
        arguments: further arguments of its ``__call__``.
        sampler: "ddim", "lcm" or "tcd" in place of its scheduler; None for its own.
        lora: file or folder of a LoRA that is merged; None for none.
        lora_weight: its weight, a factor of the file's own scale.
        offload: keep on the GPU only the part that runs.
        vae_slicing: decode images one by one.
    """

    arguments: Mapping[str, Any] = field(default_factory=dict)
    sampler: str | None = None
    lora: Path | None = None
    lora_weight: float = 1.0
    offload: bool = False
    vae_slicing: bool = False


@dataclass
class GenericPipeline:
    """A pipeline and how it is called.

    Attributes:
        pipeline: diffusers' own, in evaluation mode.
        arguments: of every call, but for what differs from batch to batch.
        path: its folder.
        device: where it computes.
        dtype: floating type of its networks.
        resolution: image side in pixels.
        stride: pixels a latent stands for; None where it has no autoencoder.
        token: pixels a token of its transformer stands for; None for a convolutional network.
        weights_sha256: over the names and contents of all weight files, and of the LoRA with its weight.
        config_sha256: over all configurations, tokenizers and schedulers.
        lora_weight: of the LoRA; None without one.
        nfe: rows of the denoising network for each image, counted in the last batch; None before.
    """

    pipeline: Any
    arguments: dict[str, Any]
    path: Path
    device: torch.device
    dtype: torch.dtype
    resolution: int
    stride: int | None
    token: int | None
    weights_sha256: str
    config_sha256: str
    lora_weight: float | None = None
    nfe: int | None = None
    _generators: Sequence[torch.Generator] = ()
    _rows: int = 0
    _advance: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        scheduler, network = self.pipeline.scheduler, denoiser(self.pipeline)
        scheduler.step = self._watched(scheduler.step)
        if network is not None:
            network.register_forward_pre_hook(self._count, with_kwargs=True)

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """Parameters of the pipeline's call."""
        return call_parameters(type(self.pipeline))

    @property
    def sampler(self) -> str:
        """The scheduler's name, such as ``FlowMatchEulerDiscrete``."""
        return type(self.pipeline.scheduler).__name__.removesuffix("Scheduler")

    @property
    def guidance_key(self) -> str | None:
        """The argument that --guidance sets; None for a pipeline that is not guided."""
        keys = [key for key in ("guidance_scale", "true_cfg_scale") if key in self.parameters]
        return next((key for key in keys if self.parameters[key].default is not None), None)

    def settle(self, name: str, steps: int | None, guidance: float | None) -> tuple[int, float]:
        """Steps and guidance: those given, else the pipeline's defaults; steps are as many as its arguments list.

        Args:
            name: of the target, for messages.
            steps: given, or None.
            guidance: given, or None.

        Raises:
            UsageError: a scale that the pipeline has no use for, or that needs a negative prompt; not finite; or other
                steps than the arguments list.
        """
        key, parameters = self.guidance_key, self.parameters
        for grid in (grid for grid in GRIDS if self.arguments.get(grid) is not None):
            num = len(self.arguments[grid])
            if steps not in (None, num):
                raise UsageError(f"{name}: {steps} steps, but --pipeline-kwargs {grid} lists {num}; give --steps {num}")
            steps = num
        if steps is None:
            steps = int(parameters["num_inference_steps"].default)
        if key is None:
            if guidance not in (None, 1.0):
                raise UsageError(
                    f"{name}: {type(self.pipeline).__name__} takes no guidance scale; leave out --guidance"
                )
            return steps, 1.0
        if key == "true_cfg_scale" and self.arguments.get("negative_prompt") is None:
            if guidance is not None and guidance > 1:
                raise UsageError(
                    f"{name}: {type(self.pipeline).__name__} is guided against a negative prompt only; add "
                    "--pipeline-kwargs 'negative_prompt=\" \"'"
                )
            guidance = 1.0
        chosen = float(parameters[key].default if guidance is None else guidance)
        if not math.isfinite(chosen):
            raise UsageError(f"{name}: guidance {chosen} is not a finite number")
        return steps, chosen

    def own_fields(self) -> dict[str, Any]:
        """What decides an image besides sampler settings, resolution and hashes."""
        fields = {"pipeline": type(self.pipeline).__name__, "pipeline_kwargs": self.arguments}
        return fields if self.lora_weight is None else fields | {"lora_weight": self.lora_weight}

    def network_evaluations(self, steps: int, guidance_scale: float) -> int | None:
        """Network evaluations of each image, as counted in the last batch; None before the first."""
        return self.nfe

    def text_limits(self) -> dict[str, tuple[Any, int]]:
        """Tokenizer of each text encoder, and how many tokens it reads."""
        given = self.arguments.get("max_sequence_length", self._default("max_sequence_length"))
        found = {}
        for name, part in self.pipeline.components.items():
            limit = getattr(part, "model_max_length", None)
            if "tokenizer" not in name or limit is None:
                continue
            if given is not None and not isinstance(part, transformers.CLIPTokenizer):
                limit = given
            if limit < MAX_TOKENS:
                found[name.replace("tokenizer", "text_encoder")] = (part, limit)
        return found

    @contextmanager
    def counted(self, advance: Callable[[], None]) -> Iterator[None]:
        """Call ``advance`` after each step of the scheduler."""
        self._advance = advance
        try:
            yield
        finally:
            self._advance = None

    def sample(
        self, prompts: Sequence[str], generators: Sequence[torch.Generator], *, num_steps: int, guidance_scale: float
    ) -> Tensor:
        """Call the pipeline.

        Args:
            prompts: B texts.
            generators: B CPU generators, one per image.
            num_steps: sampling steps.
            guidance_scale: of the argument that :attr:`guidance_key` names.

        Returns:
            (B, 3, H, W) float32 in [0, 1], on the model's device.

        Raises:
            UsageError: the pipeline fails with these settings, gives images of another size, or draws noise outside of
                the generators.
        """
        call = {key: _for_each(key, value, len(prompts)) for key, value in self.arguments.items()}
        if self.guidance_key is not None:
            call[self.guidance_key] = guidance_scale
        call |= {"prompt": list(prompts), "generator": list(generators), "num_inference_steps": num_steps}
        self._generators, self._rows = list(generators), 0
        with self._explained(num_steps), self._own_noise():
            grid = self.pipeline.scheduler.config.get(STEPS_KEY)
            if grid and all(call.get(key) is None for key in GRIDS):
                call["sigmas"] = flow_grid(num_steps, grid)
            images = torch.from_numpy(self.pipeline(**call, output_type="np").images)
        self.nfe = self._rows // len(prompts) or None
        wanted = (len(prompts), self.resolution, self.resolution, 3)
        if tuple(images.shape) != wanted:
            raise UsageError(
                f"{self.path}: gives images of shape {tuple(images.shape)}, not {wanted}; name a size that it makes "
                "with --pipeline-kwargs height=N --pipeline-kwargs width=N"
            )
        return images.permute(0, 3, 1, 2).float().to(self.device)

    def _default(self, name: str) -> Any:
        return self.parameters[name].default if name in self.parameters else None

    def _watched(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The scheduler's step, with the images' generators where it takes some and is given none."""
        draws = "generator" in inspect.signature(step).parameters

        @functools.wraps(step)  # pipelines inspect its signature
        def watched(*args: Any, **kwargs: Any) -> Any:
            if draws and kwargs.get("generator") is None:
                kwargs["generator"] = self._generators
            result = step(*args, **kwargs)
            if self._advance is not None:
                self._advance()
            return result

        return watched

    def _count(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._rows += len(args[0] if args else next(iter(kwargs.values())))

    @contextmanager
    def _own_noise(self) -> Iterator[None]:
        """Refuse noise from the global generators."""
        before = self._global_state()
        yield
        if any(not torch.equal(old, new) for old, new in zip(before, self._global_state(), strict=True)):
            raise UsageError(
                f"{self.path}: {self.sampler} draws noise outside of the images' generators, so that an image would "
                "depend on its batch; give another sampler with --sampler"
            )

    def _global_state(self) -> list[Tensor]:
        on_gpu = [torch.cuda.get_rng_state(self.device)] if self.device.type == "cuda" else []
        return [torch.get_rng_state(), *on_gpu]

    @contextmanager
    def _explained(self, steps: int) -> Iterator[None]:
        """Explain what a pipeline raises on settings that it cannot take."""
        try:
            with quiet_libraries():
                yield
        except UsageError:
            raise
        except (*_CALL_ERRORS, RuntimeError) as error:
            if isinstance(error, RuntimeError) and (lacks_memory(error) or "CUDA" in str(error)):
                raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UsageError(
                f"{self.path}: {type(self.pipeline).__name__} with {self.sampler} fails in {steps} steps ({lines[0]}); "
                "try more --steps, another --sampler, or other --pipeline-kwargs"
            ) from error


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_CALL_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, ImportError)


def load_generic(
    path: Path, device: str | torch.device, dtype: torch.dtype, options: CallOptions | None = None
) -> GenericPipeline:
    """Load a pipeline folder from the disk alone.

    Args:
        path: the folder.
        device: where it computes.
        dtype: of its networks.
        options: what is changed of its defaults.

    Raises:
        UsageError: not a text-to-image pipeline of diffusers; a missing or damaged part, or one that would run code of
            the folder; arguments it does not take; a LoRA that does not fit.
    """
    options, device = options or CallOptions(), torch.device(device)
    weights, kind = check_pipeline(path), pipeline_class(path)
    arguments = settle_arguments(kind, options.arguments)
    parts = {name: load_part(path, each, dtype) for name, each in weights.items()}
    # A watermark is put in wherever a package is installed; a safety checker paints images black.
    off = {"add_watermarker": False, SAFETY: None, "requires_safety_checker": False}
    own = {key: value for key, value in off.items() if key in inspect.signature(kind).parameters}
    with explained(path):
        pipeline = kind.from_pretrained(path, local_files_only=True, **left_out(path), **parts, **own)
    if getattr(pipeline, "scheduler", None) is None:
        raise UsageError(f"{path}: has no scheduler; fetch or write the folder again")
    pipeline.set_progress_bar_config(disable=True)
    if options.sampler is not None:
        pipeline.scheduler = _other_scheduler(path, pipeline.scheduler, options.sampler)
    weights_hash = hash_weights(weights)
    if options.lora is not None:
        if (embedding := find_adapter(options.lora).with_name(EMBEDDING_FILE)).is_file():
            raise UsageError(f"{embedding}: of a student of Stable Diffusion 1 or 2; name its base")
        networks = {name: part for name, part in parts.items() if _adaptable(name)}
        merge_lora(options.lora, networks, options.lora_weight, _converter(pipeline))
        files = " ".join(sha256_file(file) for file in adapter_files(options.lora))
        weights_hash = hashlib.sha256(f"{weights_hash} {files} {options.lora_weight!r}".encode()).hexdigest()
    stride = _stride(pipeline)
    resolution = _resolution(path, pipeline, arguments, stride)
    if options.vae_slicing:
        autoencoder(pipeline).enable_slicing()
    _place(pipeline, device, options.offload)
    return GenericPipeline(
        pipeline,
        arguments,
        path,
        device,
        dtype,
        resolution,
        stride,
        _token(pipeline, stride),
        weights_hash,
        config_sha256(path),
        None if options.lora is None else options.lora_weight,
    )


def pipeline_class(path: Path) -> type[DiffusionPipeline]:
    """The class of a pipeline folder, which makes images of prompts alone.

    Raises:
        UsageError: a class that this diffusers lacks, or of another task; names the task.
    """
    name = model_index(path)["_class_name"]
    kind = getattr(diffusers, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, DiffusionPipeline)):
        raise UsageError(
            f"{path}: diffusers {diffusers.__version__} has no pipeline {name!r}; install a newer diffusers"
        )
    parameters = call_parameters(kind)
    listed = kind in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()
    others = [task for key, task in OTHER_TASKS.items() if key in parameters]
    if "image" in parameters and not listed:
        others.append("an image-to-image pipeline")
    if "prompt" not in parameters:
        others.append("a pipeline without prompts")
    if others or "num_inference_steps" not in parameters:
        task = others[0] if others else "a pipeline without sampling steps"
        hint = "the combined pipeline" if "embeddings" in task else "its text-to-image pipeline"
        raise UsageError(
            f"{path}: {name} is {task}; give {hint}, as AutoPipelineForText2Image.from_pretrained(...) and "
            "save_pretrained(FOLDER) write it"
        )
    return kind


def call_parameters(kind: type[DiffusionPipeline]) -> Mapping[str, inspect.Parameter]:
    """Named parameters of a pipeline's ``__call__``."""
    every = inspect.signature(kind.__call__).parameters  # type: ignore[operator]
    return {name: each for name, each in every.items() if name != "self" and each.kind not in _VARIADIC}


def settle_arguments(kind: type[DiffusionPipeline], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of every call.

    ``clean_caption`` is on by default in some pipelines, and silently off where a package is missing; settled here.

    Raises:
        UsageError: an argument that the pipeline does not take, or that rgbench sets; several texts for one prompt; or
            steps that are no list.
    """
    parameters = call_parameters(kind)
    for key in given:
        if key in RESERVED:
            raise UsageError(f"--pipeline-kwargs {key}: {RESERVED[key]}; leave it out")
        if key not in parameters:
            known = [name for name in parameters if name not in RESERVED]
            raise UsageError(f"--pipeline-kwargs {key}: {kind.__name__} does not take it; {suggest(key, known)}")
        if _ONE_TEXT.fullmatch(key) and not isinstance(given[key], str | None):
            raise UsageError(f"--pipeline-kwargs {key}: give one text, which goes with every prompt")
        if key in GRIDS and not (isinstance(given[key], list | None) and given[key] != []):
            raise UsageError(f"--pipeline-kwargs {key}: give a list of numbers, one for each step")
    found = dict(given)
    if "clean_caption" in parameters and found.setdefault("clean_caption", parameters["clean_caption"].default):
        missing = [name for name in CLEANERS if find_spec(name) is None]
        if missing and given.get("clean_caption"):
            raise UsageError(f"--pipeline-kwargs clean_caption: needs {', '.join(missing)}; install it, or say false")
        if missing:
            log.warning("clean_caption is off: %s is not installed", ", ".join(missing))
            found["clean_caption"] = False
    return found


def denoiser(pipeline: Any) -> nn.Module | None:
    """The network that is called in each step; None where its place is not known."""
    return next((part for name in ("transformer", "unet") if (part := getattr(pipeline, name, None)) is not None), None)


def autoencoder(pipeline: Any) -> Any:
    """The autoencoder.

    Raises:
        UsageError: the pipeline has none.
    """
    found = next((part for name in ("vae", "movq", "vqgan") if (part := getattr(pipeline, name, None))), None)
    if found is None or not hasattr(found, "enable_slicing"):
        raise UsageError(f"--vae-slicing: {type(pipeline).__name__} has no VAE that can be sliced; leave it out")
    return found


def _adaptable(name: str) -> bool:
    return name in ("transformer", "unet") or name.startswith("text_encoder")


def _other_scheduler(path: Path, own: Any, sampler: str) -> Any:
    flow = type(own).__name__.startswith("FlowMatch")
    known = FLOW_SAMPLERS if flow else SAMPLERS
    if sampler not in known:
        raise UsageError(
            f"{path}: --sampler {sampler} has no form for a flow-matching model; use {', '.join(known)} or its own"
        )
    with explained(path):
        return getattr(diffusers, known[sampler]).from_config(own.config)


def _converter(pipeline: Any) -> Callable[[Path], dict[str, Tensor]] | None:
    """diffusers' own reader of a LoRA file of other trainers' names; None where the pipeline has none."""
    read = getattr(type(pipeline), "lora_state_dict", None)
    if read is None:
        return None
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    if getattr(pipeline, "unet", None) is not None:
        options["unet_config"] = pipeline.unet.config
    if "return_alphas" in inspect.signature(read).parameters:
        options["return_alphas"] = True

    def convert(file: Path) -> dict[str, Tensor]:
        with quiet_libraries(), diffusers_notes() as notes:
            found = read(str(file.parent), weight_name=file.name, **options)
        if dropped := next((note for note in notes if _DROPPED.search(note)), None):
            raise UsageError(
                f"{file}: diffusers reads a part of it alone ({dropped:.120}); give a LoRA without the rest"
            )
        state, alphas = found if isinstance(found, tuple) else (found, None)
        # named after the tensor where its layer is meant: to_q_lora.down.weight.alpha
        named = {_ALPHA.sub(".alpha", name): torch.as_tensor(value) for name, value in (alphas or {}).items()}
        return state | named

    return convert


def _stride(pipeline: Any) -> int | None:
    for place in (pipeline, getattr(pipeline, "decoder_pipe", None)):
        for key in ("vae_scale_factor", "movq_scale_factor"):
            if isinstance(found := getattr(place, key, None), int):
                return found
    return None


def _token(pipeline: Any, stride: int | None) -> int | None:
    """Pixels between two tokens of a transformer, which packs latents itself or is given packed ones."""
    network, vae = getattr(pipeline, "transformer", None), getattr(pipeline, "vae", None)
    if network is None or stride is None:
        return None
    patch = network.config.get("patch_size") or 1
    config = vae.config if vae is not None else {}
    latent, inputs = config.get("latent_channels") or config.get("z_dim"), network.config.get("in_channels")
    packed = math.isqrt(inputs // latent) if isinstance(latent, int) and isinstance(inputs, int) else 1
    return stride * max(int(patch), packed, 1)


def _resolution(path: Path, pipeline: Any, arguments: Mapping[str, Any], stride: int | None) -> int:
    """The side of the images: of the arguments, else the pipeline's default."""
    parameters, network = call_parameters(type(pipeline)), denoiser(pipeline)
    sizes = [arguments.get(key, parameters[key].default if key in parameters else None) for key in ("height", "width")]
    config: Any = network.config if network is not None else {}
    latent = getattr(pipeline, "default_sample_size", None) or config.get("sample_size")
    if sizes == [None, None] and isinstance(latent, int) and stride is not None:
        sizes = [latent * stride] * 2
    height, width = sizes
    if not isinstance(height, int) or height != width or height < 1:
        raise UsageError(
            f"{path}: images of {height}×{width} pixels; name one side with --pipeline-kwargs height=N "
            "--pipeline-kwargs width=N"
        )
    return height


def _place(pipeline: Any, device: torch.device, offload: bool) -> None:
    if not offload:
        pipeline.to(device)
        return
    if device.type == "cpu":
        raise UsageError("--offload: moves networks between a GPU and the CPU; leave it out on the CPU")
    try:
        pipeline.enable_model_cpu_offload(device=device)
    except ValueError as error:
        raise UsageError(f"--offload: {type(pipeline).__name__} cannot be offloaded ({error}); leave it out") from error


def _for_each(key: str, value: Any, num: int) -> Any:
    """A text for every prompt of a batch, as the list of prompts has one."""
    return [value] * num if isinstance(value, str) and "prompt" in key.split("_") else value
