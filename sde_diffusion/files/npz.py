"""Arrays in .npz files from anywhere, read without trust.

A .npz is a zip of .npy files. What each claims to hold is read and judged before room is made for
it, and nothing is unpickled.
"""

import io
import lzma
import math
import os
import stat
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sde_diffusion.files import storage
from sde_diffusion.files.storage import BadFile

__all__ = ["read_npz", "write_npz"]

LIMIT = 4096  # of every size of an array; the widest features in use have 2,048


HEAD = 2**16  # bytes, of the head of an array and of a zip's table of contents


# What zipfile, zlib and numpy's header parser raise on bytes that are not theirs.
DAMAGE = (
    ValueError, TypeError, KeyError, EOFError, RuntimeError, SyntaxError, OverflowError,
    RecursionError, MemoryError, struct.error, tokenize.TokenError, zipfile.BadZipFile,
    zlib.error, lzma.LZMAError,
)  # fmt: skip


def write_npz(path: Path, **arrays: Any) -> None:
    """Write arrays by name: the whole file, or none."""
    data = io.BytesIO()
    np.savez(data, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.replace(path, data.getvalue())


def read_npz(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """The real arrays by these names, of at most two sizes and 4,096 in each.

    Raises:
        storage.BadFile: naming the file and the reason.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadFile(f"{path}: not a regular file")
        check_contents(path)
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = sorted(entry.filename.removesuffix(".npy") for entry in entries)
            allowed = {*required, *optional}
            if len(set(names)) < len(names) or not set(required) <= set(names) <= allowed:
                wanted = " and ".join(required) + "".join(f" (and {name})" for name in optional)
                raise BadFile(f"{path}: must hold {wanted}; it holds {', '.join(names)[:200]}")
            return {entry.filename.removesuffix(".npy"): array(archive, entry) for entry in entries}
    except BadFile:
        raise
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror or error}") from None
    except DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadFile(f"{path}: not a .npz of arrays, or damaged ({reason[:200]})") from None


def check_contents(path: Path) -> None:
    """Refuse a zip whose table of contents is long: zipfile reads it whole, entry by entry."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - HEAD))
        tail = file.read(HEAD)
    at = tail.rfind(b"PK\5\6")  # where the record of the end begins; its field 12 is that size
    if at < 0 or len(tail) < at + 22:
        raise ValueError("no zip's end")
    (size,) = struct.unpack("<I", tail[at + 12 : at + 16])
    if size > HEAD or tail[max(0, at - 20) :].startswith(b"PK\6\7"):
        raise ValueError("a table of contents too long for a few arrays")


def array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Any:
    """One array, if it is what it says."""
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{entry.filename} is packed in an unknown way")
    if entry.file_size > 8 * LIMIT**2 + HEAD:  # no more than this is ever unpacked of it
        raise ValueError(f"{entry.filename} has {entry.file_size} bytes")
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, columns_first, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, columns_first, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f"{entry.filename} has the unknown version {version}")
        if dtype.kind not in "fiu":
            raise ValueError(f"{entry.filename} holds {dtype}, not real numbers")
        if len(shape) > 2 or any(not 0 <= size <= LIMIT for size in shape):
            raise ValueError(f"{entry.filename} has the shape {shape}")
        size = math.prod(shape) * dtype.itemsize
        data = file.read(size + 1)
    if len(data) != size:
        raise ValueError(f"{entry.filename} is not the {size} bytes that its header says")
    flat = np.frombuffer(data, dtype)
    return flat.reshape(shape, order="F" if columns_first else "C")
