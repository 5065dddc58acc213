"""Files on the Hugging Face hub: found in the local cache, never fetched by rgbench.

A compute node is often offline, and a download of gigabytes should not begin unasked: what is not here is named, with
its size and the command that gets it. So ``HF_HUB_OFFLINE=1`` changes nothing that rgbench does.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rgbench.core.errors import UsageError

# Where HPSv2 publishes its checkpoints (arXiv 2306.09341): v2.0 and v2.1 side by side.
HPS_REPO, HPS_REVISION = "xswu/HPSv2", "697403c78157020a1ae59d23f111aa58ced35b0a"


class MissingFiles(UsageError):
    """Files that have to be fetched first.

    Args:
        what: names them, with their size.
        command: gets them.
    """

    def __init__(self, what: str, command: str) -> None:
        self.what, self.command = what, command
        where = " (HF_HUB_OFFLINE is on: run it where there is a network, with the same HF_HOME)"
        super().__init__(f"{what}; get it with: {command}{where if is_offline() else ''}")


@dataclass(frozen=True)
class HubFiles:
    """Files of one repository at one revision.

    Attributes:
        repo: ``owner/name``.
        revision: commit, 40 hex digits.
        files: path in the repository → size in bytes.
    """

    repo: str
    revision: str
    files: Mapping[str, int]

    def snapshot(self) -> Path | None:
        """The folder of this revision in the local cache (``HF_HOME``); None where nothing of it was fetched."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(snapshot_download(self.repo, revision=self.revision, local_files_only=True))
        except LocalEntryNotFoundError:
            return None

    def missing(self) -> list[str]:
        """Files that are not in the cache."""
        folder = self.snapshot()
        return [name for name in self.files if folder is None or not (folder / name).is_file()]

    def find(self, what: str) -> Path:
        """The folder of the snapshot, with all files in it.

        Args:
            what: what is looked for, for the message.

        Raises:
            MissingFiles: names what is missing, its size and the command that gets it.
        """
        folder, absent = self.snapshot(), self.missing()
        if folder is None or absent:
            raise self.lacking(what, absent)
        return folder

    def lacking(self, what: str, absent: Iterable[str]) -> MissingFiles:
        """The error that says what is missing, its size, and the command that gets it.

        Args:
            what: what is looked for.
            absent: file names, some of ``files``.
        """
        names = list(absent)
        size = readable_size(sum(self.files[name] for name in names))
        large = [name for name in names if self.files[name] >= 10**6]
        listed = [f"{name} ({readable_size(self.files[name])})" for name in large]
        listed += [f"{len(names) - len(large)} small files"] if len(names) > len(large) else []
        message = f"{what}: not in the Hugging Face cache: {', '.join(listed)} of {self.repo}, {size} in all"
        return MissingFiles(message, self.command(names))

    def command(self, names: Iterable[str]) -> str:
        """The shell command that fetches some of the files into the cache."""
        return shlex.join(["hf", "download", self.repo, *names, "--revision", self.revision])


def is_offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` is on, by huggingface_hub's reading of it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def readable_size(num_bytes: int) -> str:
    """Like ``3.44 GB``; decimal units, as the hub shows them."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes} bytes"
