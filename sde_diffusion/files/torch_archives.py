"""Weights that others saved with torch.save: read by an explicit call, and only as tensors.

Such a file is a zip archive of a pickle and of raw numbers. torch.load(weights_only=True) runs no
code from it, but believes the archive: it checks no checksum (of 1,000 flipped bits 948 loaded
silently), and lets a few bytes ask for any amount of memory. So the archive is checked first, one
member after the other, and torch is handed a copy made of the members that were checked.
"""

import hashlib
import io
import math
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickletools import genops
from typing import Any

import torch
from torch import Tensor

from sde_diffusion.files import storage
from sde_diffusion.files.strict_json import near

__all__ = ["import_weights", "rename"]

MEMBERS = 10_000  # of an archive


WORDS = 16 * 2**20  # bytes of the pickle, which holds names and shapes but no numbers


OPERATIONS = 500_000  # in it; a tensor takes about 40


SLACK = 2**20  # bytes of an archive that are not numbers


LOCAL = struct.Struct("<4s5H3L2H")  # what stands before the content of a member


# What a state dict is made of. Of what torch allows beside them, some make memory from a number.
NAMES = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch Size|"
    r"torch (Double|Float|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
)


def import_weights(
    path: str | Path, *, key: str | None = None, sha256: str | None = None
) -> dict[str, Tensor]:
    """The tensors of a state dict that torch.save wrote (.pt, .pth, .ckpt), on the CPU, copied.

    Args:
        path: the file.
        key: where the state dict is in a dict, its name there, such as "state_dict" or "ema".
        sha256: what the SHA-256 of the file must be. Needed for the format that torch wrote before
            version 1.6: it has no checksums, so somebody must vouch for the bytes.
    Raises:
        storage.BadFile: naming the file and the reason. Nothing of the file is run, and no more
            memory is taken than about five times its size.
    """
    path = Path(path)
    with storage.regular(path) as (file, size):
        storage.check_memory(size)
        start = file.read(4)
        if start != b"PK\x03\x04" and sha256 is None:
            raise ValueError(
                "not a zip archive as torch.save writes since version 1.6; older files have no "
                "checksums: give sha256= if this is one, and you know where it is from"
            )
        data = start + file.read(size)
        found = hashlib.sha256(data).hexdigest()
        if sha256 is not None and found != sha256.lower():
            raise ValueError(f"its SHA-256 is {found}, not the one given")
        if start == b"PK\x03\x04":
            data = checked_archive(data, known=sha256 is not None)
        return tensors_of(entry_of(unpacked(data), key), size)


def unpacked(data: bytes) -> Any:
    """What torch.load makes of bytes that were checked, or vouched for: tensors and dicts."""
    try:
        return torch.load(  # noqa: TID251  the one place: by explicit call, and weights_only
            io.BytesIO(data), map_location="cpu", weights_only=True
        )
    except Exception as error:  # its text advises to load the file without that protection
        name = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(
            f"holds {name[1]!r:.80}, which is not loaded: only tensors in dicts are"
            if name
            else f"torch cannot read it ({type(error).__name__})"
        ) from None


def checked_archive(data: bytes, *, known: bool) -> bytes:
    """The archive written anew from members that have the recorded checksums and sizes.

    Args:
        known: somebody vouches for the bytes: another program may have packed them.
    """
    clean = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as archive,
        zipfile.ZipFile(clean, "w", zipfile.ZIP_STORED) as copy,
    ):
        members = archive.infolist()
        check_members(members, len(data))
        if not known and not laid_out(data, members, archive.start_dir):
            raise ValueError(
                "damaged between its members, or not packed by torch.save: give sha256= if you "
                "know where it is from"
            )
        for member in members:
            content = archive.read(member)  # checks the CRC-32
            if member.filename.endswith("/data.pkl"):
                check_words(content)
            copy.writestr(zipfile.ZipInfo(member.filename), content)
    return clean.getvalue()


def check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    """Refuse an archive that torch.save does not write: compressed, encrypted, ambiguous."""
    if len(members) > MEMBERS:
        raise ValueError(f"{len(members):,} members; an archive has {MEMBERS:,} at most")
    for member in members:
        name = member.filename
        if not re.fullmatch(r"[\w .+=@-]+(/[\w .+=@-]+)+", name, re.ASCII) or "/.." in f"/{name}":
            raise ValueError(f"a member with the name {name!r:.80}")
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise ValueError(f"member {name!r:.80} is compressed, which torch.save does not do")
        if member.flag_bits & 0x1:
            raise ValueError(f"member {name!r:.80} is encrypted")
    names = [member.filename.casefold() for member in members]
    if len(set(names)) < len(names):
        raise ValueError("two members have one name")
    if len({name.split("/")[0] for name in names}) != 1:
        raise ValueError("not a file of torch.save: its members are not in one folder")
    if sum(name.count("/") == 1 and name.endswith("/data.pkl") for name in names) != 1:
        raise ValueError("not a file of torch.save: no data.pkl in its folder")
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise ValueError("a TorchScript program, not weights")
    if any(member.file_size > WORDS for member in members if member.filename.endswith(".pkl")):
        raise ValueError(f"its data.pkl is larger than {WORDS:,} bytes")
    if sum(member.file_size for member in members) > size:
        raise ValueError("its members are larger than the file")


def laid_out(data: bytes, members: list[zipfile.ZipInfo], end: int) -> bool:
    """Is every byte beside the contents of the members one that torch.save puts there?

    Checksums cover the contents only. A flipped bit beside them has no effect on the copy that is
    loaded, but tells that the file is no longer the one that was written.
    """
    place = 0
    for member in sorted(members, key=lambda one: one.header_offset):
        length, here = member.file_size, data[place : place + LOCAL.size]
        if member.header_offset != place or len(here) < LOCAL.size:
            return False
        _, version, flags, method, clock, day, crc, packed, size, letters, more = LOCAL.unpack(here)
        place += LOCAL.size + letters
        extra = data[place : place + more]
        place += more + length
        told = (version, flags, method, (day, clock))
        if told != (member.extract_version, member.flag_bits, 0, dos_time(member)):
            return False
        if packed != size or (crc, size) not in (
            (0, 0), (member.CRC, length), (0, 2**32 - 1), (member.CRC, 2**32 - 1)
        ) or not padding(extra):  # fmt: skip
            return False
        if flags & 0x8:  # checksum and sizes stand after the content, in 32 bits or in 64
            mark = b"PK\x07\x08" + struct.pack("<L", member.CRC)
            short = mark + (struct.pack("<2L", length, length) if length < 2**32 else b"")
            long = mark + struct.pack("<2Q", length, length)
            found = [one for one in (long, short) if data.startswith(one, place)]
            if not found:
                return False
            place += len(found[0])
    alike = {(m.create_version, m.create_system, m.extract_version, m.reserved, m.flag_bits,
              m.date_time, m.internal_attr, m.external_attr, m.volume, m.comment)
             for m in members}  # fmt: skip
    listed = end  # where the entry of a member begins in the list at the end
    for member in members:
        lengths = (len(member.filename), len(member.extra), 0)
        if struct.unpack("<3H", data[listed + 28 : listed + 34]) != lengths:
            return False
        listed += 46 + sum(lengths)
    return place == end and len(alike) == 1 and data[listed:] in ends(members, end, listed - end)


def dos_time(member: zipfile.ZipInfo) -> tuple[int, int]:
    """Day and time of a member as an archive writes them."""
    year, month, day, hour, minute, second = member.date_time
    return (year - 1980) << 9 | month << 5 | day, hour << 11 | minute << 5 | second // 2


def padding(extra: bytes) -> bool:
    """Is this the field FB, with which torch.save moves the content to a multiple of 64 bytes?

    Before it, for large members, there may be the field of their sizes.
    """
    if extra[:2] == b"\x01\x00":
        extra = extra[4 + int.from_bytes(extra[2:4], "little") :]
    letters = extra[4:]
    return not extra or extra == b"FB" + struct.pack("<H", len(letters)) + b"Z" * len(letters)


def ends(members: list[zipfile.ZipInfo], end: int, listed: int) -> list[bytes]:
    """The last bytes of an archive whose list begins at `end` and has so many bytes."""
    count = len(members)
    long = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 0x31E, 45, 0, 0, count, count, listed, end)
    long += struct.pack("<4sLQL", b"PK\x06\x07", 0, end + listed, 1)
    most = (min(count, 0xFFFF), min(count, 0xFFFF), min(listed, 2**32 - 1), min(end, 2**32 - 1))
    short = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, *most, 0)
    return [short, long + short]


def check_words(content: bytes) -> None:
    """Refuse a pickle that names anything but what a state dict is made of. Runs none of it."""
    for k, (operation, argument, _) in enumerate(genops(content)):
        if k > OPERATIONS:
            raise ValueError(f"data.pkl has more than {OPERATIONS:,} operations")
        if operation.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"data.pkl has the operation {operation.name}, not of torch.save")
        if operation.name == "GLOBAL" and not NAMES.fullmatch(str(argument)):
            name = str(argument).replace(" ", ".")
            raise ValueError(f"holds {name!r:.80}, which is not loaded: only tensors in dicts are")


def entry_of(loaded: Any, key: str | None) -> dict[Any, Any]:
    """The dict under `key`, or the whole one."""
    if not isinstance(loaded, dict):
        raise ValueError(f"holds a {type(loaded).__name__}, not a dict of tensors")
    if key is None:
        return loaded
    names = [name for name in loaded if isinstance(name, str)]
    if key not in loaded:
        raise ValueError(f"has no {key!r}{near(key, names)}; it has {', '.join(names[:10]):.300}")
    if not isinstance(loaded[key], dict):
        raise ValueError(f"{key!r} is a {type(loaded[key]).__name__}, not a dict of tensors")
    return loaded[key]


def tensors_of(found: dict[Any, Any], size: int) -> dict[str, Tensor]:
    """Contiguous copies of the entries, all of which must be plain tensors of finite numbers."""
    parts = [
        name for name, value in found.items() if isinstance(name, str) and dict_of_tensors(value)
    ]
    total = 0
    for name, value in found.items():
        if not isinstance(name, str) or not name.isprintable() or len(name) > 200:
            raise ValueError(f"a name that is no word: {name!r:.80}")
        if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided:
            ask = f"; give the key of a dict: {', '.join(parts[:10]):.300}" if parts else ""
            raise ValueError(f"{name!r} is not a tensor but of type {type(value).__name__}{ask}")
        if value.dtype not in storage.DTYPES.values():
            raise ValueError(f"tensor {name!r} is of {value.dtype}")
        total += math.prod(value.shape) * value.dtype.itemsize
        if total > 2 * size + SLACK:  # twice: tied weights are stored once and named twice
            raise ValueError(f"its tensors take more than twice the {size:,} bytes of the file")
    copies = {name: value.detach().clone(memory_format=torch.contiguous_format)
              for name, value in found.items()}  # fmt: skip
    storage.check_numbers(copies)
    return copies


def dict_of_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(one, Tensor) for one in value.values())


def rename(tensors: Mapping[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `old` beginning with `new` instead.

    Raises:
        ValueError: if none does, or if two tensors would have one name.
    """
    if not any(name.startswith(old) for name in tensors):
        raise ValueError(f"no tensor begins with {old!r:.80}{near(old, tensors)}")
    made = {new + name.removeprefix(old) if name.startswith(old) else name: value
            for name, value in tensors.items()}  # fmt: skip
    if len(made) < len(tensors):
        raise ValueError(f"{old!r:.80} -> {new!r:.80} gives two tensors one name")
    return made
