"""Atomic writes and safe readers: the one module that opens untrusted bytes.

Writes leave the old file or the new one, never half: temporary name, fsync, rename. Nothing that is read is executed:
weights come from safetensors or from torch's weights-only unpickler, JSON is strict, images are size-checked before
they are decoded, tar members are listed and never extracted. A test bans ``torch.load(``, pickles, ``eval(`` and
``yaml.load(`` from every other module.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import re
import secrets
import struct
import tarfile
import tempfile
import threading
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from rgbench.core.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

INDEX = "index.json"  # of a folder of images that rgbench wrote
MAX_STEM = 80  # characters
MAX_PIXELS = 64_000_000  # below the 89 million at which Pillow begins to warn
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
CHUNK_BYTES = 1 << 20
SEAL = "sha256"  # last key of a JSON file that carries its own checksum
SUMS = "rgbench.sha256"  # of a folder of a model that rgbench wrote; `sha256sum -c` reads it
CODE_KEYS = {"auto_map", "trust_remote_code"}  # by which transformers loads Python files

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(/[A-Za-z0-9.-]+)*")
_SUM = re.compile(rb"([0-9a-f]{64})  ([^/].*)")
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
# What the decoders of torch and Pillow raise on damaged input.
_TORCH_ERRORS: tuple[type[Exception], ...] = (
    *(pickle.UnpicklingError, RuntimeError, OSError, ValueError, KeyError, IndexError, TypeError),
    *(EOFError, AttributeError, AssertionError, struct.error),
)
_PIL_ERRORS: tuple[type[Exception], ...] = (
    *(OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, OverflowError, TypeError),
    *(struct.error, zlib.error, MemoryError),
)
_SAMPLINGS = {0: "4:4:4", 1: "4:2:2", 2: "4:2:0"}
_SURROGATE = re.compile("[\ud800-\udfff]")  # how Python decodes bytes that are no UTF-8
_EXIF_ORIENTATION = 274
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # orientation → PIL.Image.Transpose that undoes it

# ---- names -------------------------------------------------------------------------------


def file_stem(text: str) -> str:
    """Text as part of a file name, distinct for distinct texts.

    Plain text is kept, its slashes as underscores; other text is shortened, with its hash.
    """
    if len(text) <= MAX_STEM and _PLAIN.fullmatch(text):
        return text.replace("/", "_")
    slug = re.sub(r"[^A-Za-z0-9]+", "-", text)[:40].strip("-")
    return f"{slug or 'prompt'}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def is_folder_name(name: object) -> bool:
    """Whether a field of a file can be used as the name of one folder: no path, nothing hidden, nothing unprintable."""
    return (
        isinstance(name, str)
        and 0 < len(name.encode("utf-8", "surrogatepass")) <= 200
        and not name.startswith(".")
        and not set(name) & set("/\\")
        and name.isprintable()
    )


def user_cache(name: str) -> Path:
    """A folder for what can be made again: ``$XDG_CACHE_HOME/rgbench/name``, else ``~/.cache/rgbench/name``.

    Where a user has no home, as in containers, it lies in the folder for temporary files.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(root) if root else Path.home() / ".cache"
    except RuntimeError:
        folder = Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
    return folder / "rgbench" / name


def normal_form(name: str) -> str:
    """A file name under which "é" as one character and "é" as two, as macOS writes it, are the same."""
    return unicodedata.normalize("NFC", name)


def check_place(path: Path) -> None:
    """Refuse a path at which no folder can be made or filled, before any work is done for it.

    Raises:
        UsageError: a file is in the way, the folder above may not be written to, or no file can have this name.
    """
    above = Path(path)
    try:
        above.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', error)}; choose another place") from error
    while not os.path.lexists(above) and above != above.parent:
        above = above.parent
    if not above.is_dir():
        what = "a file is in the way" if above == path else f"{above} is not a folder"
        raise UsageError(f"{path}: {what}; choose another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(f"{path}: no permission to write into {above}; choose another place")


# ---- writes ------------------------------------------------------------------------------


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
    """Replace ``path`` by ``data``, atomically."""
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
        raise ValueError(f"{path}: not written: {error}; store null for a value that does not exist") from error
    write_text_atomic(path, text + "\n")


def save_safetensors_atomic(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> str:
    """Replace ``path`` by a safetensors file, atomically.

    Returns:
        sha256 of the file, as hex.
    """
    return write_chunks_atomic(path, safetensors_chunks(tensors, metadata))


def safetensors_chunks(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Iterator[bytes]:
    """Stream a safetensors file as byte strings, one tensor in memory at a time.

    Streaming gives the sha256 in the same pass, and a full disk shows as ``OSError`` (the library's own writer reports
    it as a parse error). Tensors may share memory; each is written out. Widest types come first, so that all stay
    aligned.

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


# ---- hashes, JSON and code ---------------------------------------------------------------


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


def canonical_sha256(content: Any) -> str:
    """sha256 of the canonical JSON of plain data.

    Raises:
        ValueError: NaN or infinity in it.
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON data with a last key ``sha256`` over all others, for :func:`unseal`."""
    plain = json.loads(json.dumps(content, allow_nan=False))  # lists for tuples, as a reader gets them
    return {**plain, SEAL: canonical_sha256(plain)}


def unseal(content: Any, where: str | Path, remedy: str, error: type[UsageError] = UsageError) -> dict[str, Any]:
    """What :func:`seal` sealed, without its ``sha256``.

    A file without one is taken as it is, since older versions wrote none: who reads it must refuse unknown keys, or a
    damaged name of this key would pass.

    Args:
        content: parsed JSON.
        where: the file, and its line.
        remedy: what to do about a damaged one.
        error: class of what is raised.

    Raises:
        UsageError: no mapping, or its values are not those that were sealed.
    """
    if not isinstance(content, dict):
        raise error(f"{where}: not a JSON object; {remedy}")
    plain = dict(content)
    found = plain.pop(SEAL, None)
    if found is not None and found != canonical_sha256(plain):
        raise error(f"{where}: its sha256 does not match its contents; {remedy}")
    return plain


def write_sums(folder: Path) -> None:
    """Write ``rgbench.sha256`` over all files of a folder but its cards, for :func:`check_sums`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (SUMS, "README.md"))
    lines = [f"{sha256_file(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    write_text_atomic(folder / SUMS, "".join(lines))


def check_sums(folder: Path) -> None:
    """Check a folder against the ``rgbench.sha256`` in it or in its parent; one without is taken as it is.

    A file that has not changed since this process hashed it is not read again.

    Raises:
        UsageError: a listed file is missing or differs, or the list itself is damaged.
    """
    for root in (folder, folder.parent):
        if (root / SUMS).is_file():
            _check_listed(root, folder)


def _check_listed(root: Path, folder: Path) -> None:
    sums, remedy = root / SUMS, f"write or fetch the folder again, or remove {SUMS} where you changed it on purpose"
    *lines, rest = sums.read_bytes().split(b"\n")
    for number, line in enumerate([*lines, *([rest] if rest else [])], 1):
        match = _SUM.fullmatch(line)
        if match is None or ".." in match[2].decode("utf-8", "replace").split("/"):
            raise UsageError(f"{sums}:{number}: damaged; {remedy}")
        path = root / os.fsdecode(match[2])
        if not path.is_relative_to(folder):
            continue
        if not path.is_file() or sha256_once(path) != match[1].decode():
            raise UsageError(f"{path}: missing or not the file of {sums}; {remedy}")


def sha256_once(path: Path) -> str:
    """sha256 of a file's bytes; one that has not changed since this process hashed it is not read again."""
    return _sha256_of(path.resolve(), file_stamp(path))


@lru_cache(maxsize=1024)
def _sha256_of(path: Path, stamp: tuple[int, ...]) -> str:
    return sha256_file(path)


def file_stamp(path: Path) -> tuple[int, int, int]:
    """Size and times that change with a file's contents; archives and copies set the first time, none the second."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def parse_json(data: bytes | str) -> Any:
    """Parse strict JSON.

    Raises:
        ValueError: not UTF-8, not JSON, NaN or infinity, a number too large for a float, or a key twice.
        RecursionError: nested too deep.
    """
    text = data.decode("utf-8") if isinstance(data, bytes) else data
    return json.loads(text, object_pairs_hook=_distinct, parse_constant=_finite, parse_float=_finite, parse_int=_whole)


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


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"key {key!r} occurs twice")
        out[key] = value
    return out


def _finite(token: str) -> float:
    value = float(token)
    if not math.isfinite(value):
        raise ValueError(f"{token} is not a JSON number")
    return value


def _whole(token: str) -> int:
    if not math.isfinite(float(token)):  # arithmetic would fail on it; tokenizers say "no limit" by 10^30
        raise ValueError(f"{token[:20]}… is too large for a number")
    return int(token)


def refuse_code(folder: Path) -> None:
    """Check that no configuration of a model folder asks a library to run Python files.

    transformers would run them, or ask on standard input whether to.

    Raises:
        UsageError: one does; names the file and the key.
    """
    for file in sorted(folder.rglob("*config.json")):
        values = [read_json(file)]
        for value in values:  # grows by what each value holds
            if isinstance(value, dict):
                if keys := [key for key in CODE_KEYS if value.get(key)]:
                    raise UsageError(f"{file}: {keys[0]} asks for Python code of the model to be run; remove the key")
                value = list(value.values())
            values += value if isinstance(value, list) else []


# ---- tensors -----------------------------------------------------------------------------


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a weight file, on the CPU; its contents decide the format, not its name.

    Args:
        path: safetensors, or a ``.pt``, ``.pth`` or ``.bin`` file of tensors.

    Raises:
        UsageError: as :func:`load_safetensors` and :func:`load_pickled_state_dict`.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise UsageError(f"{path}: cannot read: {error.strerror or error}") from error
    return (
        load_safetensors(path) if start[8:] == b"{" or path.suffix == ".safetensors" else load_pickled_state_dict(path)
    )


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU.

    Raises:
        UsageError: no such file, or not a whole safetensors file.
    """
    from safetensors.torch import load_file

    with _safetensors_errors(path):
        return load_file(path)


def open_safetensors(path: Path) -> dict[str, Any]:
    """Tensors of a file by name, of which ``tensor[i]`` reads row i alone and ``tensor[:]`` all.

    Raises:
        UsageError: no such file, or not a whole safetensors file.
    """
    from safetensors import safe_open

    with _safetensors_errors(path):
        file = safe_open(path, framework="pt")
        return {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118


def check_tensors(
    path: Path,
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    owner: str,
    remedy: str = "fetch or write it again",
) -> None:
    """Check that a file's tensors are those of a network, by name, shape, and whether they are floating or whole.

    Args:
        path: the file.
        state: its tensors.
        own: the network's.
        owner: whose the network's tensors are, for the message.
        remedy: what to do.

    Raises:
        UsageError: a tensor is missing, is quantised, has another shape, or is one that the network lacks; names the
            first.
    """
    found, wanted = ({name: _described(tensor) for name, tensor in each.items()} for each in (state, own))
    wrong = sorted(name for name in found | wanted if found.get(name) != wanted.get(name))
    if wrong:
        first = f"{wrong[0]!r} is {found.get(wrong[0], 'missing')}, not {wanted.get(wrong[0], 'there')}"
        raise UsageError(f"{path}: {len(wrong)} tensors are not those of {owner}: {first}; {remedy}")


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}" if tensor.is_floating_point() else f"{tuple(tensor.shape)} of {tensor.dtype}"


def save_checked(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] = {}) -> None:
    """Replace ``path`` by a safetensors file whose header has a checksum of its tensors and metadata, for a cache."""
    whole = {**metadata, SEAL: _tensors_sha256(tensors, metadata)}
    save_safetensors_atomic(dict(tensors), path, whole)


def load_checked(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Load the tensors and metadata that :func:`save_checked` wrote.

    Raises:
        UsageError: as :func:`load_safetensors`, or they do not match their checksum.
    """
    tensors, metadata = load_safetensors(path), read_safetensors_metadata(path)
    if metadata.pop(SEAL, None) != _tensors_sha256(tensors, metadata):
        raise UsageError(f"{path}: its contents do not match their checksum; remove it")
    return tensors, metadata


def _tensors_sha256(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        for chunk in safetensors_chunks({name: tensor}):
            digest.update(chunk)
    return digest.hexdigest()


def read_safetensors_metadata(path: Path) -> dict[str, str]:
    """The strings in a safetensors file's header; its tensors are not read. Raises as :func:`load_safetensors`."""
    from safetensors import safe_open

    with _safetensors_errors(path), safe_open(path, framework="np") as file:
        return dict(file.metadata() or {})


@contextmanager
def _safetensors_errors(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError) as error:
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


# ---- images ------------------------------------------------------------------------------


class ImageHeader(NamedTuple):
    """What is known of an image before it is decoded.

    Attributes:
        size: width and height.
        inexact: what 8-bit RGB could not hold of it, or None.
        format: "PNG", "JPEG", "WEBP" or "BMP", by its contents.
        table: a JPEG's first quantisation table (luma), 64 numbers in natural order; empty for other formats.
        sampling: a JPEG's chroma subsampling, such as "4:2:0"; "" where there is none or it is another one.
    """

    size: tuple[int, int]
    inexact: str | None
    format: str
    table: tuple[int, ...] = ()
    sampling: str = ""


def inspect_image(path: Path) -> ImageHeader:
    """Read an image file's header: size, format, compression.

    Raises:
        UsageError: no such file, or not a PNG, JPEG, WebP or BMP image.
    """
    with _opened_image(path, str(path)) as image:
        tables = getattr(image, "quantization", None) or {}
        sampling = ""
        if image.format == "JPEG":
            from PIL.JpegImagePlugin import get_sampling

            sampling = _SAMPLINGS.get(get_sampling(image), "")
        return ImageHeader(image.size, _inexact(image), str(image.format), tuple(tables.get(0, ())), sampling)


def open_image(
    source: Path | str | bytes, max_pixels: int = MAX_PIXELS, exact: bool = False, upright: bool = False
) -> Image:
    """Decode one image to 8-bit RGB; of an animation, the first frame.

    Grey, palette, CMYK and 16-bit images are converted; transparency is laid on white.

    Args:
        source: a PNG, JPEG, WebP or BMP file, or its bytes.
        max_pixels: refuse larger images before decoding them.
        exact: refuse what the conversion would change: transparency, CMYK, 16 bits, a turn by EXIF, animation.
        upright: turn it as its EXIF orientation says, as viewers do.

    Raises:
        UsageError: no such file, another format, truncated or damaged, too large, of float or 32-bit pixels,
            or not exact where that is asked for.
    """
    name = "image bytes" if isinstance(source, bytes) else str(source)
    with _opened_image(source, name) as image:
        if image.width * image.height > max_pixels:
            raise UsageError(f"{name}: {image.width}×{image.height} exceeds {max_pixels} pixels; make it smaller")
        reason = _inexact(image) if exact else None
        if reason:
            raise UsageError(f"{name}: {reason}; save it as an 8-bit RGB image")
        with _whole_alone:
            image.load()
        turn = image.getexif().get(_EXIF_ORIENTATION, 1) if upright else 1
        rgb = _to_rgb(image, name)
    from PIL.Image import Transpose

    return rgb.transpose(Transpose(_TURNS[turn])) if turn in _TURNS else rgb


class _WholeAlone:
    """Has Pillow refuse truncated images while any thread decodes here, whatever else the process set."""

    def __init__(self) -> None:
        self._lock, self._num, self._before = threading.Lock(), 0, False

    def __enter__(self) -> None:
        from PIL import ImageFile

        with self._lock:
            if not self._num:
                self._before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
            self._num += 1

    def __exit__(self, *_: object) -> None:
        from PIL import ImageFile

        with self._lock:
            self._num -= 1
            if not self._num:
                ImageFile.LOAD_TRUNCATED_IMAGES = self._before


_whole_alone = _WholeAlone()


@contextmanager
def _opened_image(source: Path | str | bytes, name: str) -> Iterator[Image]:
    """An image by its contents, undecoded; what Pillow raises on it becomes a UsageError that has its name."""
    from PIL import Image

    if not isinstance(source, bytes) and Path(source).exists() and not Path(source).is_file():
        raise UsageError(f"{name}: not a regular file; name an image")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=IMAGE_FORMATS) as image:
            yield image
    except FileNotFoundError as error:
        raise UsageError(f"{name}: no such file") from error
    except Image.DecompressionBombError as error:
        raise UsageError(f"{name}: refused: {error}") from error
    except _PIL_ERRORS as error:
        raise UsageError(f"{name}: not a readable PNG, JPEG, WebP or BMP image ({error})") from error


def _inexact(image: Image) -> str | None:
    """What 8-bit RGB could not hold of an image that is not decoded yet."""
    if image.has_transparency_data:
        return f"has transparency ({image.mode})"
    if image.mode not in ("RGB", "L", "P", "1"):
        return f"has pixels of mode {image.mode}"
    if any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):  # Pillow cuts 16-bit RGB to 8 bits in silence
        return "has 16 bits per channel"
    if getattr(image, "n_frames", 1) > 1:
        return "is an animation"
    return "is turned by its EXIF orientation" if image.getexif().get(_EXIF_ORIENTATION, 1) != 1 else None


def _to_rgb(image: Image, name: str) -> Image:
    """A copy with 8-bit RGB pixels: 16-bit levels scaled, transparency on white."""
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


# ---- tars --------------------------------------------------------------------------------


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
        UsageError: no such file, compressed, damaged or truncated, several tars in one file, a name twice; or a member
            that is absolute, climbs with ``..``, or is a link, device or sparse file. The member is named.
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
            end = tar.offset
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError) as error:
        raise UsageError(f"{path}: not a readable uncompressed tar ({error})") from error
    _check_end(path, end)
    return list(members.values())


def _check_end(path: Path, end: int) -> None:
    """Check that zeros alone follow: tarfile takes a broken header, or zeros between two tars, for the end."""
    with open(path, "rb") as file:
        file.seek(end)
        after = file.read(tarfile.BLOCKSIZE)
        if len(after) < tarfile.BLOCKSIZE or any(after):
            raise UsageError(f"{path}: no end mark after byte {end}: truncated or damaged; fetch or write it again")
        while chunk := file.read(CHUNK_BYTES):
            if any(chunk):
                raise UsageError(f"{path}: holds more after its end mark: several tars in one file; give each alone")


def _safe_member(info: tarfile.TarInfo, path: Path) -> TarMember:
    name = info.name.removeprefix("./")
    reason = None
    if _SURROGATE.search(name):
        reason = "has a name that is not UTF-8"
    elif not info.isreg() or info.issparse():
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
