"""The ``data:`` section of a recipe, one model per kind."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rgbench.core.config import Section

Resolution = Annotated[int, Field(ge=8, le=4096, multiple_of=8)]


class ScenesData(Section):
    """Benchtop scenes, rendered when they are loaded.

    Attributes:
        split: ``train`` holds no held-out combination; the others are for evaluation and the attribute classifiers.
        num: read the first ``num`` scenes in shuffled epochs; null for scenes without end, each seen once.
    """

    kind: Literal["scenes"] = "scenes"
    split: Literal["train", "test", "heldout", "all", "web"] = "train"
    num: Annotated[int, Field(ge=1)] | None = None


class ImageFolderData(Section):
    """A folder of images with captions.

    Attributes:
        path: the folder, with its subfolders; hidden files and folders are left out.
        resolution: side in pixels after the resize of the short side and the centre crop.
        captions: ``txt``: beside each image, a file of the same name ending in .txt;
            ``metadata.jsonl``: rows with ``file_name`` and ``text``;
            ``captions.csv``: a header with ``file_name`` and ``text``.
    """

    kind: Literal["image_folder"] = "image_folder"
    path: str
    resolution: Resolution
    captions: Literal["txt", "metadata.jsonl", "captions.csv"] = "txt"


class WebDatasetData(Section):
    """Uncompressed tars whose samples are one image (.jpg, .png, .webp …) and one .txt of the same key.

    Attributes:
        path: a folder of tars, one tar, or a list of tars; read in sorted order.
        resolution: as for image folders.
    """

    kind: Literal["webdataset"] = "webdataset"
    path: str | list[str]
    resolution: Resolution


class HFDatasetData(Section):
    """A data set of the Hugging Face ``datasets`` library (an extra: ``rgbench[datasets]``).

    Attributes:
        path: a folder that ``save_to_disk`` wrote, a parquet file or a folder of them, or the name of a data set of
            parquet files on the hub, which is read from the local cache.
        split: of those it has; local parquet files are one split.
        revision: of a data set on the hub: a commit, for runs that can be repeated.
        image_column: holds the images.
        caption_column: holds texts, or lists of which the first is taken.
        resolution: as for image folders.
    """

    kind: Literal["hf_dataset"] = "hf_dataset"
    path: str
    split: str = "train"
    revision: str | None = None
    image_column: str = "image"
    caption_column: str = "text"
    resolution: Resolution


class TeacherData(Section):
    """Latents that the teacher sampled, which ``rgbench cache --from teacher`` wrote.

    Attributes:
        path: the folder that it printed.
    """

    kind: Literal["teacher"] = "teacher"
    path: str


DataConfig = Annotated[
    ScenesData | ImageFolderData | WebDatasetData | HFDatasetData | TeacherData, Field(discriminator="kind")
]
