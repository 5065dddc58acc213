"""Writes that leave the old file or the new one, never half: temporary name, fsync, rename.

Everything here is offered by :mod:`rgbench.files` too, where the readers are.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_BYTES = 1 << 20

_SAFETENSORS_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


def write_synced(path: Path, chunks: Iterable[bytes | memoryview]) -> str:
    """Write a new file and wait until the disk has it.

    Args:
        path: must not exist yet.
        chunks: the contents, in order.

    Returns:
        sha256 of what was written, as hex.

    Raises:
        OSError: the file exists, no space, no permission; what was written is removed.
    """
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try:
            for chunk in chunks:
                digest.update(chunk)
                rest = memoryview(chunk)
                while rest:
                    rest = rest[os.write(descriptor, rest[:CHUNK_BYTES]) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException as error:
        os.unlink(path)
        if isinstance(error, OSError):
            error.filename = str(path)  # os.write does not say where the disk is full
        raise
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Wait until the disk has a folder's entries: a rename is durable only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_chunks_atomic(path: Path, chunks: Iterable[bytes | memoryview]) -> str:
    """Replace ``path`` by the chunks; a reader sees the old file or the new one.

    Returns:
        sha256 of the contents, as hex.

    Raises:
        OSError: the disk refused; ``path`` is then as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name[:100]}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        digest = write_synced(temporary, chunks)
    except OSError as error:
        error.filename = str(path)
        raise
    try:
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    sync_folder(path.parent)
    return digest


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` (temporary name, fsync, rename, fsync of the folder)."""
    write_chunks_atomic(path, [data])


def write_text_atomic(path: Path, text: str) -> None:
    """Replace ``path`` by UTF-8 ``text``, atomically."""
    write_chunks_atomic(path, [text.encode("utf-8")])


def write_json_atomic(path: Path, obj: Any) -> None:
    """Replace ``path`` by strict, indented JSON, atomically.

    Raises:
        ValueError: NaN or infinity somewhere in ``obj``; JSON has no such number.
    """
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path}: not written: {error}; store null for a figure that does not exist") from error
    write_text_atomic(path, text + "\n")


def save_safetensors_atomic(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> str:
    """Replace ``path`` by a safetensors file, atomically.

    Returns:
        sha256 of the file, as hex.
    """
    return write_chunks_atomic(path, safetensors_chunks(tensors, metadata))


def safetensors_chunks(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Iterator[bytes]:
    """A safetensors file as a stream of byte strings, one tensor in memory at a time.

    Streaming gives the sha256 in the same pass, and a full disk shows as ``OSError``
    (the library's own writer reports it as a parse error). Tensors may share memory;
    each is written out. Widest types come first, so that all stay aligned.

    Args:
        tensors: name → tensor of any device and layout.
        metadata: strings for the header.

    Raises:
        TypeError: a dtype that the format does not name.
    """
    import torch

    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in ordered:
        dtype = _SAFETENSORS_DTYPES.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None:
            raise TypeError(f"tensor {name!r}: dtype {tensor.dtype} cannot be stored")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    yield struct.pack("<Q", len(encoded)) + encoded
    for _, tensor in ordered:
        flat = tensor.detach().to("cpu").contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().tobytes()
