"""Named protocols of the set metrics: which prompts, which reference, and how both sides are resized.

They are those of the literature on MS-COCO. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rgbench.core.errors import UsageError, suggest

Crop = Literal["square256", "patch299"]


@dataclass(frozen=True)
class SetProtocol:
    """One way of measuring a Fréchet distance on MS-COCO that papers share.

    Attributes:
        name: as ``--protocol`` takes it.
        about: one line.
        num_prompts: generated images.
        num_reference: real images.
        captions: name of the published caption list; None for any.
        crop: of both sides.
    """

    name: str
    about: str
    num_prompts: int
    num_reference: int
    captions: str | None
    crop: Crop


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        SetProtocol(
            "coco14-30k",
            "FID as in DMD2, SiD-LSG, GigaGAN: 30,000 val2014 captions, all of val2014, both sides to 256 px",
            *(30_000, 40_504, "coco14-30k", "square256"),
        ),
        SetProtocol(
            "coco14-30k-patch299",
            "the same prompts and reference, central 299 px at native size: sees fine artefacts; one resolution only",
            *(30_000, 40_504, "coco14-30k", "patch299"),
        ),
        SetProtocol(
            "coco17-5k",
            "5,000 val2017 captions, all of val2017, both sides to 256 px",
            *(5_000, 5_000, None, "square256"),
        ),
    )
}


def find_protocol(name: str) -> SetProtocol:
    """A protocol by name.

    Raises:
        UsageError: no such name; suggests the nearest.
    """
    if name not in PROTOCOLS:
        raise UsageError(f"unknown protocol '{name[:80]}'; {suggest(name, PROTOCOLS)}")
    return PROTOCOLS[name]
