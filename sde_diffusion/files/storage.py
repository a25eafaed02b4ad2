"""Save and load: tensors as safetensors, metadata as JSON, SHA-256 checks, atomic rename.

Files are untrusted input, and nothing in one is executed. Reading has stages: first the JSON record
and the header of the tensors, 4 MiB each at most; then, if all of it fits together, the tensors, as
many bytes as the file has. SHA-256 detects corruption and not attacks: whoever changes a file can
change its hash. So every other check is made whatever the hash is.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from sde_diffusion.files.strict_json import LIMIT, near, parsed, plain, printable

__all__ = ["BadFile", "Saved", "check_fit", "examine", "load", "read", "write"]

FORMAT = 2

OURS = ("format", "sha256", "record_sha256")  # entries that `write` adds to a record

SMALL = 64 * 2**20  # bytes; up to here SHA-256 is checked before the header is used

TENSORS = 10_000  # in one file

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


SIGNS = {
    b"PK": "a zip archive; files.torch_archives reads those of torch.save",
    **{bytes([0x80, protocol]): "a pickle, which is never read" for protocol in range(2, 6)},
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"GIF8": "a GIF picture",
    b"\x1f\x8b": "gzip",
    b"\x93NUMPY": "a numpy array",
    b"\x89HDF": "HDF5",
    b"{": "JSON",
    b"<": "HTML or XML",
}


class BadFile(ValueError):
    """A file that cannot be used: one printable line with its name and the reason."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class Saved(NamedTuple):
    """A pair of files whose record and header are valid; `load` reads the tensors."""

    path: Path
    record: dict[str, Any]
    outline: dict[str, Tensor]  # names, shapes and dtypes: tensors on the meta device
    size: int  # bytes


# ---- writing ----------------------------------------------------------------------------------
def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any],
    infinite: Container[str] = (),
) -> None:
    """Write path (.safetensors) and its JSON: both, or neither if the disk is full.

    Anything that `read` would refuse is refused here. A process killed between the two renames
    leaves a pair that `read` refuses; training checkpoints avoid this by renaming a whole folder.

    Args:
        infinite: names of the tensors in which inf is a value, such as a mask of attention.
    Raises:
        ValueError: if another number is not finite, with the name of its tensor.
    """
    from safetensors.torch import save

    check_suffix("path", path)
    taken = [name for name in OURS if name in record]
    if taken:
        raise ValueError(f"record must not hold the reserved name {', '.join(taken)}")
    tensors = copies(tensors)  # tied weights share memory, and are written once for each name
    data = save(tensors)
    parse_header(data[8 : header_end(data[:8], len(data))], len(data))
    check_numbers(tensors, infinite)
    whole = plain({"format": FORMAT, "sha256": hashlib.sha256(data).hexdigest(), **record})
    whole["record_sha256"] = record_hash(whole)
    text = (json.dumps(whole, indent=1) + "\n").encode()
    parsed(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_all({path: data, path.with_suffix(".json"): text})


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to contiguous memory of the CPU."""
    form = torch.contiguous_format
    return {k: v.detach().to("cpu", copy=True, memory_format=form) for k, v in tensors.items()}


def record_hash(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record; independent of white space and of the order of names."""
    rest = {name: value for name, value in record.items() if name != "record_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def replace(path: Path, data: bytes) -> None:
    """Write a file beside `path`, flush it to the disk, and rename it over `path`."""
    replace_all({path: data})


def replace_all(contents: Mapping[Path, bytes]) -> None:
    """Write files beside their places, flush them to the disk, and only then rename them all."""
    temporaries = {path: path.with_name(path.name + ".part") for path in contents}
    try:
        for path, data in contents.items():
            temporaries[path].unlink(missing_ok=True)  # "x": never through a link left there
            with naming(path), open(temporaries[path], "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
    except OSError:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
        raise
    for path, temporary in temporaries.items():
        os.replace(temporary, path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to an OSError without one, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` outlast a power cut, where the system can open folders."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- reading ----------------------------------------------------------------------------------
def read(
    path: Path, names: Sequence[str] | None = None, infinite: Container[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the record that `write` wrote.

    Args:
        names: of the tensors that the file must hold, and no others [any].
        infinite: as in `write`.
    Raises:
        BadFile: naming the file and the reason.
    """
    saved = examine(path)
    if names is not None:
        with as_bad_file(path):
            check_names("tensor", saved.outline, names)
    return load(saved, infinite), saved.record


def examine(path: Path) -> Saved:
    """Return the record and the names, shapes and dtypes of the tensors that `write` wrote.

    Reads at most 64 MiB, whatever the size of the files, so that the caller can check the outline
    before the tensors are read.

    Raises:
        BadFile: naming the file and the reason.
    """
    with as_bad_file(path):
        check_suffix("the name", path)
    with regular(path) as (file, size):
        start = file.read(8)
        outline = parse_header(file.read(header_end(start, size) - 8), size)
    with regular(path.with_suffix(".json")) as (file, _):
        record = parsed(file.read(LIMIT + 1))
        check_record(record)
    saved = Saved(path, record, outline, size)
    if size <= SMALL:  # then what is damaged is refused as damaged
        checked_bytes(saved)
    return saved


def load(saved: Saved, infinite: Container[str] = ()) -> dict[str, Tensor]:
    """Return the tensors of an examined pair, or raise BadFile. Takes twice its size in memory."""
    from safetensors.torch import load as decode

    with as_bad_file(saved.path):
        tensors = decode(checked_bytes(saved))
        check_numbers(tensors, infinite)
    return tensors


def checked_bytes(saved: Saved) -> bytes:
    """Return the bytes of the .safetensors file if they have the SHA-256 of its record."""
    with regular(saved.path) as (file, size):
        check_memory(size)
        data = file.read(saved.size + 1)
        if hashlib.sha256(data).hexdigest() != saved.record["sha256"]:
            record = f"{saved.path.stem}.json, which has another SHA-256"
            raise ValueError(f"truncated, damaged, or not the file of {record}")
    return data


def check_suffix(name: str, path: Path) -> None:
    """Refuse any path but one of a .safetensors file."""
    if path.suffix != ".safetensors":
        raise ValueError(f"{name} must end in .safetensors; got {path}")


@contextmanager
def regular(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file for reading and yield it with its size; any exception is a BadFile."""
    no_wait = getattr(os, "O_NONBLOCK", 0)  # opening a pipe without a writer would block
    with (
        as_bad_file(path),
        open(path, "rb", opener=lambda name, how: os.open(name, how | no_wait)) as file,
    ):
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("a pipe, a socket or a device, not a file")
        yield file, status.st_size


@contextmanager
def as_bad_file(path: Path, note: str = "") -> Iterator[None]:
    """Turn every exception raised inside into a BadFile of `path`, and of the file it describes.

    Every exception, not a list of them: the exceptions that torch and constructors raise at numbers
    far outside their range are not documented.
    """
    if path.suffix == ".json":
        note = f" (the record of {path.with_suffix('.safetensors')})"
    try:
        yield
    except BadFile:
        raise
    except MemoryError:
        raise BadFile(f"{path}: does not fit in memory{note}") from None
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror or error}{note}") from None
    except Exception as error:
        lines = str(error).strip().splitlines() or [f"damaged ({type(error).__name__})"]
        raise BadFile(f"{path}: {lines[0]:.500}{note}") from None


def check_memory(size: int) -> None:
    """Refuse a file larger than the memory of this machine, if the system reports it."""
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ()):
        most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if size > most:
            raise ValueError(f"{size:,} bytes; this machine has {most:,} of memory")


def check_record(record: Mapping[str, Any]) -> None:
    """Refuse anything but a record of `write`."""
    check_names("entry", record, OURS, others=True)
    found = record["format"]
    if type(found) is not int or found != FORMAT:
        known = type(found) is int and found > 0
        age = ("of a newer version" if found > FORMAT else "an older one") if known else "unknown"
        raise ValueError(f"format {found!r:.40}, {age}; this version reads format {FORMAT}")
    if record["record_sha256"] != record_hash(record):
        raise ValueError("damaged: its SHA-256 differs from the recorded one")


def check_names(
    kind: str, found: Iterable[str], wanted: Iterable[str], *, others: bool = False
) -> None:
    """Refuse a collection of names that lacks one of `wanted`, or has others unless allowed."""
    found, wanted = dict.fromkeys(found), dict.fromkeys(wanted)
    unknown = [name for name in found if name not in wanted]
    missing = [name for name in wanted if name not in found]
    if missing:
        more = f" nor {len(missing) - 1} others" if len(missing) > 1 else ""
        raise ValueError(f"no {kind} {missing[0]!r:.200}{more}{near(missing[0], unknown)}")
    if unknown and not others:
        raise ValueError(f"unknown {kind} {unknown[0]!r:.200}{near(unknown[0], wanted)}")


def header_end(start: bytes, size: int) -> int:
    """Return where the header of a .safetensors file of `size` bytes ends, by its first 8 bytes."""
    length = int.from_bytes(start, "little")
    if len(start) == 8 and 2 <= length <= min(size - 8, LIMIT):
        return 8 + length
    what = next((kind for sign, kind in SIGNS.items() if start.startswith(sign)), "")
    if not what and len(start) == 8 and start.isascii() and start.decode().isprintable():
        what = "text"
    if not what and size < 8:
        what = "truncated" if size else "empty"
    what = what or f"truncated, or of another format (its header would have {length:,} bytes)"
    raise ValueError(f"not a safetensors file: {what}; it has {size:,} bytes")


def parse_header(header: bytes, size: int) -> dict[str, Tensor]:
    """Return the tensors in the header of a file of `size` bytes, on the meta device.

    Their offsets are left to safetensors: in `load` it refuses tensors whose bytes overlap, leave
    gaps, or are not as many as their shapes need.
    """
    try:
        entries = parsed(header)
    except ValueError as error:
        raise ValueError(f"damaged, or not a safetensors file; its header: {error}") from None
    if len(entries) > TENSORS:
        raise ValueError(f"a file must hold at most {TENSORS:,} tensors; got {len(entries):,}")
    outline: dict[str, Tensor] = {}
    for name, entry in entries.items():
        if not allowed(name):
            raise ValueError(f"a tensor's name is not printable, or too long: {name!r:.80}")
        if not isinstance(entry, dict) or sorted(entry) != ["data_offsets", "dtype", "shape"]:
            raise ValueError(f"tensor {name!r} must have dtype, shape and data_offsets only")
        if (dtype := DTYPES.get(str(entry["dtype"]))) is None:
            raise ValueError(f"tensor {name!r} has the unknown dtype {entry['dtype']!r:.40}")
        if not isinstance(entry["shape"], list) or len(entry["shape"]) > 64:
            raise ValueError(f"tensor {name!r} has the shape {entry['shape']!r:.80}")
        outline[name] = torch.empty(entry["shape"], dtype=dtype, device="meta")
    needed = 8 + len(header) + sum(tensor.nbytes for tensor in outline.values())
    if needed != size:
        raise ValueError(f"truncated or damaged: {size:,} bytes; its header needs {needed:,}")
    return outline


def allowed(name: str) -> bool:
    """True for the names that a tensor may have in a file."""
    return name.isprintable() and len(name) <= 200


def check_numbers(tensors: Mapping[str, Tensor], infinite: Container[str] = ()) -> None:
    """Refuse nan, inf but for the tensors named in `infinite`, and bytes that are no bool."""
    for name, value in tensors.items():
        if value.dtype == torch.bool and not bool((value.view(torch.uint8) <= 1).all()):
            raise ValueError(f"tensor {name!r} has bytes that are no bool")
        ends = value.detach().aminmax() if value.is_floating_point() and value.numel() else ()
        if any(map(math.isnan, ends)) or not (name in infinite or all(map(math.isfinite, ends))):
            raise ValueError(f"tensor {name!r} has values that are not finite")


def check_fit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse tensors whose names, shapes or dtypes are not the wanted ones."""
    check_names("tensor", found, wanted)
    for name, like in wanted.items():
        right, got = kind_of(like), kind_of(found[name])
        if right != got:
            raise ValueError(f"tensor {name!r} must be {right}; got {got}")


def kind_of(value: Any) -> str:
    """Return shape and dtype of a tensor, or the type of another value."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} of {value.dtype}"
    return type(value).__name__
