"""Training data: scenes, image folders, webdataset tars; one sampler; prompt sets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rgbench.registry import resolve

if TYPE_CHECKING:
    from rgbench.data.config import DataConfig
    from rgbench.data.contract import DataSource


def open_source(section: DataConfig) -> DataSource:
    """Open the data source that a recipe's ``data:`` section describes.

    Args:
        section: one of the models in :mod:`rgbench.data.config`, by its ``kind``.

    Raises:
        UsageError: an unknown kind, nothing found at the path, a folder that is not
            what the section says, or more than 0.1 % unreadable samples.
    """
    return resolve("data", section.kind)(section)


def prepare_source(section: DataConfig, part: int, num_parts: int) -> None:
    """Do one rank's share of the work that every rank's :func:`open_source` will then find done.

    Args:
        section: ``data:`` of the recipe.
        part: this rank's number.
        num_parts: ranks.

    Raises:
        UsageError: as :func:`open_source`, for what this rank has looked at.
    """
    if section.kind == "webdataset":
        from rgbench.data.sources.webdataset import index_part

        index_part(section, part, num_parts)
