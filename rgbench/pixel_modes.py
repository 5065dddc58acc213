"""Pixels of an opened image as 8-bit RGB, what that could not hold, and what its file's header says."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from rgbench.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

EXIF_ORIENTATION = 274
SAMPLINGS = {0: "4:4:4", 1: "4:2:2", 2: "4:2:0"}


class ImageHeader(NamedTuple):
    """What is known of an image before it is decoded.

    Attributes:
        size: width and height.
        inexact: what 8-bit RGB could not hold of it, or None.
        format: "PNG", "JPEG", "WEBP" or "BMP".
        table: a JPEG's first quantisation table (luma), 64 numbers in natural order; empty for other formats.
        sampling: a JPEG's chroma subsampling, such as "4:2:0"; "" where there is none or it is another one.
    """

    size: tuple[int, int]
    inexact: str | None
    format: str
    table: tuple[int, ...] = ()
    sampling: str = ""


def header_of(image: Image) -> ImageHeader:
    """The header of an image that is opened and not yet decoded."""
    tables = getattr(image, "quantization", None) or {}
    sampling = ""
    if image.format == "JPEG":
        from PIL.JpegImagePlugin import get_sampling

        sampling = SAMPLINGS.get(get_sampling(image), "")
    return ImageHeader(image.size, inexact(image), str(image.format), tuple(tables.get(0, ())), sampling)


def inexact(image: Image) -> str | None:
    """What 8-bit RGB could not hold of an image that is opened and not yet decoded."""
    if image.has_transparency_data:
        return f"has transparency ({image.mode})"
    if image.mode not in ("RGB", "L", "P", "1"):
        return f"has pixels of mode {image.mode}"
    if any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):  # Pillow cuts 16-bit RGB to 8 bits in silence
        return "has 16 bits per channel"
    if getattr(image, "n_frames", 1) > 1:
        return "is an animation"
    return "is turned by its EXIF orientation" if image.getexif().get(EXIF_ORIENTATION, 1) != 1 else None


def to_rgb(image: Image, name: str) -> Image:
    """A copy with 8-bit RGB pixels: 16-bit levels scaled, transparency on white.

    Raises:
        UsageError: 32-bit pixels, which have no fixed range; ``name`` is named.
    """
    from PIL import Image

    if image.mode == "RGB":
        return image.copy()
    if image.mode.startswith("I;16"):  # convert("RGB") would clip at 255 instead of scaling
        return image.point(lambda level: level / 257, "L").convert("RGB")
    if image.mode in ("I", "F"):
        raise UsageError(f"{name}: pixels of mode {image.mode} have no fixed range; save it with 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
