"""What every data source offers, whatever it reads from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Samples of one batch, in the order asked for.

    Attributes:
        images_BCHW: (B, 3, resolution, resolution) float32 in [0, 1].
        prompts: B captions.
        ids: B names that find the samples again, for messages.
    """

    images_BCHW: Tensor
    prompts: list[str]
    ids: list[str]


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
