"""What a metric may know of the evaluation that it belongs to, and what set metrics compare with."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgbench.core.errors import UsageError
from rgbench.core.progress import Track, untracked
from rgbench.data.prompts import PromptSet
from rgbench.metrics.features import FeatureRows, FeatureSet
from rgbench.metrics.networks import EffLite0Network, InceptionNetwork, find_inception
from rgbench.metrics.protocols import PROTOCOLS, SetProtocol
from rgbench.metrics.reference import ReferenceFolder, ReferenceScenes
from rgbench.metrics.values import Protocol

SEED_RULE = "one CPU generator per image, seeded with sha256(prompt id, seed)"
OWN_FOLDER = "folder"
VAE_STRIDE = 8  # pixels, of the VAEs of Stable Diffusion, SDXL, SD3, FLUX, PixArt and Qwen-Image

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opponent:
    """The world's teacher at its own sampler settings, whose images a model's are held against.

    Attributes:
        generation: id of how its images are made.
        fields: all that decides them, but prompt and seed.
        images: from positions of the prompts to (B, 3, H, W) uint8 images of the same prompts and seeds.
        rows: from a metric's name and protocol id to its stored (n,) value of each image; None where none is stored.
    """

    generation: str
    fields: Mapping[str, Any]
    images: Callable[[np.ndarray], Tensor]
    rows: Callable[[str, str], np.ndarray | None]


@dataclass(frozen=True)
class Context:
    """What a metric may know of the evaluation that it belongs to.

    Attributes:
        prompts: one image each.
        resolution: side of the evaluated images in pixels.
        reference: real scenes of the same prompts.
        features: of the set metrics' reference and of each batch; shared by all set metrics.
        rows: features of the evaluated images by position; shared likewise.
        reward_folder: the world's reward model.
        classifiers_folder: the oracle's attribute classifiers.
        regressors_folder: gold's regressors of degradation.
        generation: id of how the images are made; "" for images that are no model's.
        opponent: loads the world's teacher; None where the world has none.
        trained_rewards: ``rewards`` of the run's run.json; empty for a model trained on none.
        device: where networks run.
        stride: pixels that a latent of the model stands for; of images of unknown origin that of most VAEs; None for a
            model without latents.
        token: pixels that a token of the model's transformer stands for; None for a convolutional network.
        jpeg: lossy compression that the images went through; None for none.
        named: protocol of the set metrics, such as "coco14-30k", or "folder"; None for the world's own.
        departures: in what this evaluation differs from the named protocol.
        judges: files given with ``--judge``, by name.
        track: shows the progress of long computations.
    """

    prompts: PromptSet
    resolution: int
    reference: ReferenceScenes
    features: FeatureSet
    rows: FeatureRows
    reward_folder: Path
    classifiers_folder: Path
    regressors_folder: Path
    trained_rewards: tuple[Mapping[str, Any], ...]
    device: torch.device
    generation: str = ""
    opponent: Callable[[], Opponent] | None = None
    stride: int | None = VAE_STRIDE
    token: int | None = None
    jpeg: str | None = None
    named: str | None = None
    departures: tuple[str, ...] = ()
    judges: Mapping[str, Path] = field(default_factory=dict)
    track: Track = untracked

    def protocol(self, **fields: Any) -> dict[str, Any]:
        """Protocol fields: those that all metrics share, and a metric's own.

        The evaluated image is the 8-bit one that a lossless file would hold.
        """
        prompts = {"name": self.prompts.name, "sha256": self.prompts.sha256, "num": self.prompts.num_distinct}
        shared = {"prompts": prompts, "seeds": self.prompts.seeds, "seed_rule": SEED_RULE, "image": "uint8 RGB"}
        return {**shared, "jpeg": self.jpeg, **fields}

    def set_protocol(self, features: FeatureSet | None = None, **fields: Any) -> dict[str, Any]:
        """Protocol fields of a set metric: shared ones, reference and network, and its own.

        They hold the size of the generated images, but for named protocols that resize both sides to one size.

        Args:
            features: the metric's own; the shared ones by default.
            fields: the metric's own.
        """
        features = features or self.features
        named: dict[str, Any] = {"protocol": self.named, "departures": list(self.departures)} if self.named else {}
        if self.named not in PROTOCOLS or features.network.smallest is not None:
            named["generated_resolution"] = self.resolution
        return self.protocol(**named, **features.fields(), **fields)

    def see(self, images: Tensor, positions: np.ndarray) -> None:
        """Store the features of a batch in ``rows``; they are computed once for all set metrics."""
        self.rows.put(positions, self.features(images))

    def by_group(self, rows: np.ndarray) -> dict[str, float]:
        """Mean of per-image rows over each group of prompts, such as "test" and "heldout"."""
        groups = np.array([prompt.group for prompt in self.prompts.prompts])
        return {str(name): float(rows[groups == name].mean()) for name in np.unique(groups) if name}

    def clusters(self, num: int) -> np.ndarray:
        """(num,) prompt number of each of the first images: images of one prompt are not independent draws."""
        numbers: dict[str, int] = {}
        return np.array([numbers.setdefault(prompt.id, len(numbers)) for prompt in self.prompts.prompts[:num]])

    def over_prompts(self, rows: np.ndarray) -> np.ndarray:
        """(P,) mean over the seeds of each prompt, of (n,) rows of the first n images."""
        clusters = self.clusters(len(rows))
        return np.bincount(clusters, rows) / np.bincount(clusters)

    def require_images(self, metric: str, num: int) -> None:
        """Check that there are enough images.

        Raises:
            UsageError: there are fewer.
        """
        if len(self.prompts) < num:
            raise UsageError(f"metric {metric} needs at least {num} images, not {len(self.prompts)}; raise --num")


@dataclass(frozen=True)
class SetComparison:
    """What the set metrics of one command compare with.

    Attributes:
        features: of the reference, and the network.
        named: the protocol's name, or "folder"; None for the world's own.
        departures: in what this differs from that protocol; flags of every value.
    """

    features: FeatureSet
    named: str | None = None
    departures: tuple[str, ...] = ()

    def check(self, side: int, protocols: Iterable[Protocol]) -> None:
        """Check that whole real images can be compared with generated ones of ``side`` pixels.

        A named protocol resizes both sides itself; probes take native crops of what is large enough.

        Args:
            side: of the generated images, in pixels.
            protocols: of all values that are measured.

        Raises:
            UsageError: a folder of the user's own holds images of another size.
        """
        reference = self.features.reference
        if not isinstance(reference, ReferenceFolder):
            return
        if not any(protocol.fields.get("reference") == reference.fields() for protocol in protocols):
            return
        if self.named == OWN_FOLDER:
            reference.require_plain(side)
        smallest = self.features.network.smallest
        if smallest is not None and side < smallest:
            log.warning(
                "generated images of %s px are smaller than the crop of %s px and stay uncropped", side, smallest
            )


def settle_comparison(
    protocol: SetProtocol | None,
    reference: Path | None,
    inception: Path | None,
    prompts: PromptSet,
    scenes: ReferenceScenes,
    device: torch.device,
    track: Track,
    say: Callable[[str], None],
) -> SetComparison:
    """Reference and network of the set metrics.

    Without a protocol they compare with the benchtop's scenes, or with a folder of the user's own, on
    EfficientNet-Lite0 features; with one, with its reference on Inception features.

    Args:
        protocol: the named protocol, if any.
        reference: folder of real images.
        inception: the Inception file.
        prompts: of the generated images.
        scenes: the benchtop's reference.
        device: where networks run.
        track: shows the reading of images.
        say: prints a line.

    Raises:
        UsageError: a protocol without reference, an Inception file without a protocol, or a missing file.
    """
    if inception is not None and protocol is None:
        raise UsageError(f"--inception serves a named protocol; add --protocol, one of {', '.join(PROTOCOLS)}")
    if protocol is None and reference is None:
        return SetComparison(FeatureSet(scenes, EffLite0Network(device)))
    if reference is None:
        assert protocol is not None
        raise UsageError(
            f"protocol {protocol.name} compares with {protocol.num_reference:,} real images; name their folder with "
            "--reference (COCO's val2014 or val2017, unpacked)"
        )
    folder = ReferenceFolder(reference, scenes.cache, track)
    size = f"reference: {reference}: {len(folder):,} images, sha256 {folder.content[:16]}"
    if protocol is None:
        say(size)
        return SetComparison(FeatureSet(folder, EffLite0Network(device)), OWN_FOLDER)
    network = InceptionNetwork(find_inception(inception), protocol.crop, device)
    departures = _departures(protocol, prompts, folder)
    for line in (f"{protocol.name}: {protocol.about}", size):
        say(line)
    for departure in departures:
        say(f"not {protocol.name} as published: {departure}")
    return SetComparison(FeatureSet(folder, network), protocol.name, departures)


def _departures(protocol: SetProtocol, prompts: PromptSet, reference: ReferenceFolder) -> tuple[str, ...]:
    found, num_reference = [], len(reference)
    if protocol.captions is not None and prompts.published != protocol.captions:
        found.append("captions not the published list")
    if protocol.captions is None and not _describes(prompts, reference):
        found.append("captions not of the reference's images")
    if len(prompts) != protocol.num_prompts:
        found.append(f"{len(prompts):,} prompts, not {protocol.num_prompts:,}")
    if num_reference != protocol.num_reference:
        found.append(f"reference of {num_reference:,}, not {protocol.num_reference:,}")
    return tuple(found)


def _describes(prompts: PromptSet, reference: ReferenceFolder) -> bool:
    """Whether each caption belongs to an image of the reference, by COCO's numbers: annotations and file names."""
    numbers = {int(found[0]) for path in reference.files if (found := re.search(r"\d+$", path.stem))}
    own = [re.fullmatch(r"coco/(\d+)", prompt.id) for prompt in prompts.prompts]
    return all(found is not None and int(found[1]) in numbers for found in own)
