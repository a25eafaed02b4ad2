"""Arrays in .npz files, read without trust: a .npz is a zip archive of .npy files.

Sizes are checked before anything is unpacked, checksums before it is used; nothing is unpickled.
"""

import io
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sde_diffusion.files import storage

__all__ = ["read_npz", "write_npz"]

LIMIT = 4096  # largest width of features; the widest in use have 2,048

HEAD = 2**16  # bytes of an array's header, and of the archive's directory


def write_npz(path: Path, **arrays: Any) -> None:
    """Write arrays by name: the whole file, or none."""
    data = io.BytesIO()
    np.savez(data, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.replace(path, data.getvalue())


def read_npz(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """Return the arrays of real numbers with these names, 8 LIMIT^2 bytes each at most.

    Raises:
        storage.BadFile: naming the file and the reason.
    """
    with storage.regular(path) as (file, _):
        check_directory(file)
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            storage.check_names("array", entries, required, others=True)
            if len(archive.infolist()) > len(entries) or not {*required, *optional} >= {*entries}:
                raise ValueError(f"unknown or repeated arrays among {', '.join(entries):.200}")
            return {name: array(archive, entry) for name, entry in entries.items()}


def check_directory(file: BinaryIO) -> None:
    """Refuse a zip archive with a long directory: zipfile would read it whole, entry by entry."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - HEAD))
    tail = file.read(HEAD)
    at = tail.rfind(b"PK\5\6")  # the end record; the size of the directory is at byte 12
    size = int.from_bytes(tail[at + 12 : at + 16], "little")
    if at < 0 or size > HEAD or tail[max(0, at - 20) :].startswith(b"PK\6\7"):
        raise ValueError("damaged, or not a zip archive of a few arrays")


def array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Any:
    """Return one array of the archive."""
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{entry.filename} must be stored or deflated")
    if entry.file_size > 8 * LIMIT**2 + HEAD:  # no more than this is ever unpacked
        raise ValueError(f"{entry.filename} has {entry.file_size} bytes")
    try:
        data = io.BytesIO(archive.read(entry))  # checks the CRC-32
        value = np.lib.format.read_array(data, allow_pickle=False)
    except Exception as error:  # numpy's message may advise to allow pickles
        raise ValueError(f"{entry.filename} is damaged ({type(error).__name__})") from None
    if value.dtype.kind not in "fiu" or data.read(1):
        raise ValueError(f"{entry.filename} must hold real numbers only; got {value.dtype}")
    return value
