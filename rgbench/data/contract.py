"""What every data source offers, whatever it reads from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Encoded:
    """What a model's encoders make of samples.

    Attributes:
        mean: of the VAE's posterior, unscaled, (B, C, h, w).
        std: of the same.
        prompt_embeds: text-encoder states, (B, L, D).
    """

    mean: Tensor
    std: Tensor
    prompt_embeds: Tensor


@dataclass(frozen=True)
class Batch:
    """Samples of one batch, in the order asked for.

    Attributes:
        images_BCHW: (B, 3, resolution, resolution) float32 in [0, 1]; None where ``encoded`` stands for them.
        prompts: B captions.
        ids: B names that find the samples again, for messages.
        encoded: from the latents cache.
    """

    images_BCHW: Tensor | None
    prompts: list[str]
    ids: list[str]
    encoded: Encoded | None = None


class DataSource(Protocol):
    """Random access to captioned images; which ones make a batch is the sampler's business.

    Attributes:
        name: short name for messages and tables.
        length: number of samples, or None where there is no end.
    """

    name: str
    length: int | None

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data: equal fingerprints, equal samples at equal indices."""
        ...

    def load(self, indices: list[int]) -> Batch:
        """Load samples by index, a pure function of it.

        Raises:
            UsageError: more than 0.1 % of the samples cannot be read; lists the reasons.
        """
        ...
