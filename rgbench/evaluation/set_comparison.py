"""What the metrics of one command compare with: real images, network, and the protocol's name."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rgbench.data.prompts import PromptSet
from rgbench.errors import UsageError
from rgbench.metrics.contract import Quantity
from rgbench.metrics.efflite0 import EffLite0Network
from rgbench.metrics.features import FeatureSet
from rgbench.metrics.inception import InceptionNetwork, find_inception
from rgbench.metrics.protocols import PROTOCOLS, SetProtocol
from rgbench.metrics.real_images import ReferenceFolder
from rgbench.metrics.reference import ReferenceScenes
from rgbench.metrics.tracking import Track

OWN_FOLDER = "folder"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SetComparison:
    """What the set metrics of one command compare with, and by what name.

    Attributes:
        features: of the reference, and the network.
        named: the protocol's name, or None for the world's own.
        departures: in what this is not that protocol; flags of every figure.
    """

    features: FeatureSet
    named: str | None = None
    departures: tuple[str, ...] = ()

    def check(self, side: int, quantities: Sequence[Quantity]) -> None:
        """Whether whole real images can be compared with generated ones of ``side`` pixels, where figures do that.

        A named protocol resizes both sides itself; probes take native crops of what is large enough.

        Args:
            side: of the generated images, in pixels.
            quantities: all that are measured.

        Raises:
            UsageError: a folder of one's own holds images of another size.
        """
        reference = self.features.reference
        if not isinstance(reference, ReferenceFolder):
            return
        if not any(quantity.protocol.get("reference") == reference.fields() for quantity in quantities):
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
        prompts: what is generated.
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
    if protocol is None:
        say(f"reference: {reference}: {len(folder):,} images, sha256 {folder.content[:16]}")
        return SetComparison(FeatureSet(folder, EffLite0Network(device)), OWN_FOLDER)
    network = InceptionNetwork(find_inception(inception), protocol.crop, device)
    departures = _departures(protocol, prompts, folder)
    say(f"{protocol.name}: {protocol.about}")
    say(f"reference: {reference}: {len(folder):,} images, sha256 {folder.content[:16]}")
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
