"""Captions that are longer than what reads them: counted, since a reward cannot judge words that it never sees."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from rgbench.data.contract import Batch
from rgbench.rewards.tokens import num_tokens
from rgbench.trainers.contract import Reader

log = logging.getLogger("rgbench")


class CaptionCount:
    """Counts captions, and those that each reader cuts.

    Args:
        readers: what reads captions, by name.

    Attributes:
        seen: captions so far.
        cut: of them, too long for a reader, by its name.
    """

    def __init__(self, readers: Mapping[str, Reader]) -> None:
        self.readers = readers
        self.seen, self.cut = 0, dict.fromkeys(readers, 0)

    def see(self, batch: Batch) -> None:
        """Count a batch; the first caption that a reader cuts is said."""
        self.seen += len(batch.prompts)
        for name, reader in self.readers.items():
            for identity, num in zip(batch.ids, num_tokens(reader.tokenizer, batch.prompts), strict=True):
                if num <= reader.limit:
                    continue
                if not self.cut[name]:
                    log.warning(
                        "the caption of %s has %d tokens, and the %s reads %d: it does not see the rest. Such captions "
                        "are counted in run.json",
                        identity,
                        num,
                        name.replace("_", " "),
                        reader.limit,
                    )
                self.cut[name] += 1

    def read(self) -> dict[str, Any]:
        """``seen`` and ``cut``, JSON-able."""
        return {"seen": self.seen, "cut": dict(self.cut)}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Undo :meth:`read`; a reader that is new begins at nothing."""
        self.seen = kept["seen"]
        self.cut |= {name: num for name, num in kept["cut"].items() if name in self.cut}


def total(counts: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum of several ranks' :meth:`CaptionCount.read`."""
    cut = {name: sum(count["cut"][name] for count in counts) for name in counts[0]["cut"]}
    return {"seen": sum(count["seen"] for count in counts), "cut": cut}
