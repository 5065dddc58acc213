"""The one module that opens untrusted bytes; with the atomic writes of :mod:`rgbench.writing`.

Nothing read here is ever executed: weights come from safetensors or from torch's
weights-only unpickler, JSON is strict, images are size-checked before they are decoded,
tar members are listed and never extracted. A test bans ``torch.load(``, pickles,
``eval(`` and ``yaml.load(`` from every other module.
"""

from __future__ import annotations

import hashlib
import io
import pickle  # for the exception type that torch's weights-only unpickler raises
import struct
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from rgbench.errors import UsageError
from rgbench.pixel_modes import ImageHeader, header_of, inexact, to_rgb
from rgbench.strict_json import parse_json
from rgbench.writing import (
    save_safetensors_atomic,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

__all__ = [
    "TarMember",
    "inspect_image",
    "load_pickled_state_dict",
    "load_safetensors",
    "load_torchscript",
    "open_image",
    "open_safetensors",
    "open_tar",
    "parse_json",
    "read_json",
    "read_member",
    "read_safetensors_metadata",
    "save_safetensors_atomic",
    "sha256_file",
    "sha256_tree",
    "write_bytes_atomic",
    "write_json_atomic",
    "write_text_atomic",
]

MAX_PIXELS = 64_000_000  # below the 89 million at which Pillow begins to warn
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")

# What the decoders of torch and Pillow raise on damaged input.
_TORCH_ERRORS: tuple[type[Exception], ...] = (
    *(pickle.UnpicklingError, RuntimeError, OSError, ValueError, KeyError, IndexError, TypeError),
    *(EOFError, AttributeError, AssertionError, struct.error),
)
_PIL_ERRORS: tuple[type[Exception], ...] = (
    *(OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, OverflowError, TypeError),
    *(struct.error, zlib.error, MemoryError),
)


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(folder: Path) -> str:
    """sha256 over the sorted relative names and contents of all files under ``folder``, as hex."""
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def read_json(path: Path) -> Any:
    """Read strict JSON.

    Raises:
        UsageError: no such file, not UTF-8, not JSON, NaN or infinity, a key twice, nested too deep.
    """
    try:
        return parse_json(Path(path).read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: cannot read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid JSON: {error}") from error


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU.

    Raises:
        UsageError: no such file, or not a whole safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path}: not a readable safetensors file ({error}); fetch or write it again") from error


def open_safetensors(path: Path) -> dict[str, Any]:
    """Tensors of a file by name, of which ``tensor[i]`` reads row i alone and ``tensor[:]`` all.

    Raises:
        UsageError: no such file, or not a whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
        return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: not a readable safetensors file ({error}); fetch or write it again") from error


def load_pickled_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a ``.pt``, ``.pth`` or ``.bin`` file, through torch's weights-only unpickler.

    A ``state_dict`` entry, as training checkpoints have, is taken out of its wrapper.

    Returns:
        name → tensor on the CPU.

    Raises:
        UsageError: no such file, damaged, or holding anything besides tensors; nothing of it is executed.
    """
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _TORCH_ERRORS as error:
        first = str(error).split("\n", 1)[0]
        raise UsageError(
            f"{path}: refused: not a plain file of tensors ({first}); convert it to safetensors"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise UsageError(f"{path}: refused: expected names and tensors, found {type(content).__name__}")
    return dict(content)


def read_safetensors_metadata(path: Path) -> dict[str, str]:
    """The strings in a safetensors file's header; its tensors are not read. Raises as :func:`load_safetensors`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path}: not a readable safetensors file ({error}); fetch or write it again") from error


def load_torchscript(path: Path) -> Any:
    """A TorchScript module, on the CPU. It is a program: check the file's hash before.

    Raises:
        UsageError: no such file, or none of TorchScript.
    """
    import torch

    try:
        return torch.jit.load(str(path), map_location="cpu")
    except _TORCH_ERRORS as error:
        first = str(error).strip().split("\n", 1)[0]
        raise UsageError(f"{path}: not a TorchScript file ({first}); fetch it again") from error


def inspect_image(path: Path) -> ImageHeader:
    """What an image file's header says: size, format, compression (a UsageError without a header)."""
    from PIL import Image

    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return header_of(image)
    except (*_PIL_ERRORS, Image.DecompressionBombError) as error:  # type: ignore[misc]
        raise UsageError(f"{path}: not a readable PNG, JPEG, WebP or BMP image ({error})") from error


def open_image(source: Path | str | bytes, max_pixels: int = MAX_PIXELS, exact: bool = False) -> Image:
    """Decode one image to 8-bit RGB. The EXIF orientation is not applied; of an animation, the first frame.

    Grey, palette, CMYK and 16-bit images are converted; transparency is laid on white.

    Args:
        source: a PNG, JPEG, WebP or BMP file, or its bytes.
        max_pixels: refuse larger images before decoding them.
        exact: refuse what the conversion would change: transparency, CMYK, 16 bits, a turn by EXIF, animation.

    Raises:
        UsageError: no such file, another format, truncated or damaged, too large, of float or 32-bit pixels,
            or not exact where that is asked for.
    """
    from PIL import Image

    name = "image bytes" if isinstance(source, bytes) else str(source)
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=IMAGE_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise UsageError(f"{name}: {image.width}×{image.height} exceeds {max_pixels} pixels; make it smaller")
            reason = inexact(image) if exact else None
            if reason:
                raise UsageError(f"{name}: {reason}; save it as an 8-bit RGB image")
            image.load()
            return to_rgb(image, name)
    except FileNotFoundError as error:
        raise UsageError(f"{name}: no such file") from error
    except Image.DecompressionBombError as error:
        raise UsageError(f"{name}: refused: {error}") from error
    except _PIL_ERRORS as error:
        raise UsageError(f"{name}: not a readable PNG, JPEG, WebP or BMP image ({error})") from error


@dataclass(frozen=True)
class TarMember:
    """A regular file in a tar.

    Attributes:
        name: relative path with forward slashes, no ``..``.
        offset: of its first byte in the tar file.
        size: bytes.
    """

    name: str
    offset: int
    size: int


def open_tar(path: Path) -> list[TarMember]:
    """The files of an uncompressed tar, in order. Nothing is extracted; read them with :func:`read_member`.

    Args:
        path: a local file; URLs and ``pipe:`` are no files.

    Raises:
        UsageError: no such file, compressed, damaged or truncated, a name twice; or a member that is
            absolute, climbs with ``..``, or is a link, device or sparse file. The member is named.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give a local, uncompressed .tar")
    members: dict[str, TarMember] = {}
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.isdir():
                    continue
                member = _safe_member(info, path)
                if member.name in members:
                    raise UsageError(f"{path}: member {member.name!r} occurs twice")
                if member.offset + member.size > size:
                    raise UsageError(f"{path}: truncated inside member {member.name!r}; fetch or write it again")
                members[member.name] = member
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError) as error:
        raise UsageError(f"{path}: not a readable uncompressed tar ({error})") from error
    return list(members.values())


def _safe_member(info: tarfile.TarInfo, path: Path) -> TarMember:
    name = info.name.removeprefix("./")
    reason = None
    if not info.isreg() or info.issparse():
        reason = "is a link, device or special file"
    elif name.startswith("/") or "\\" in name or name[1:2] == ":":
        reason = "has an absolute or foreign path"
    elif any(part in ("", ".", "..") for part in name.split("/")):
        reason = "climbs out of its folder"
    if reason:
        raise UsageError(f"{path}: refused: member {info.name!r} {reason}")
    return TarMember(name, info.offset_data, info.size)


def read_member(file: BinaryIO, member: TarMember) -> bytes:
    """The bytes of a tar member.

    Args:
        file: the tar, opened for reading bytes.
        member: from :func:`open_tar` of the same file.

    Raises:
        UsageError: the file is shorter than when it was listed.
    """
    file.seek(member.offset)
    data = file.read(member.size)
    if len(data) != member.size:
        raise UsageError(f"{file.name}: truncated inside member {member.name!r}; fetch or write it again")
    return data
