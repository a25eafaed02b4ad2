"""Import weights that other programs saved with torch.save, as tensors only.

Such a file is a zip archive of a pickle and of raw numbers. torch.load(weights_only=True) runs no
code from it, but checks no checksum (948 of 1,000 flipped bits loaded silently), and a few bytes
can make it allocate any amount of memory. So each member of the archive is checked first, and
torch reads a copy that is made of the checked members.
"""

import hashlib
import io
import re
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

PICKLE = 16 * 2**20  # bytes of the pickle, which holds names and shapes but no numbers

OPERATIONS = 500_000  # of the pickle; a tensor takes about 40

SLACK = 2**20  # bytes of an archive that are not numbers

# The names in the pickle of a state dict; others that torch allows may allocate any memory.
NAMES = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch Size|"
    r"torch (Double|Float|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
)


def import_weights(
    path: str | Path, *, key: str | None = None, sha256: str | None = None
) -> dict[str, Tensor]:
    """Return copies, on the CPU, of the tensors of a state dict in a file of torch.save.

    Args:
        path: the file (.pt, .pth, .ckpt).
        key: the name of the state dict if it is in a dict, such as "state_dict" or "ema".
        sha256: the SHA-256 that the file must have. Needed for files of torch before version 1.6,
            whose format has no checksums.
    Raises:
        storage.BadFile: naming the file and the reason. No code of the file is run, and memory is
            limited to about five times its size.
    """
    path = Path(path)
    with storage.regular(path) as (file, size):
        storage.check_memory(size)
        data = file.read(size)
        archive = data.startswith(b"PK\x03\x04")
        if not archive and sha256 is None:
            advice = "if it is from before version 1.6 and you know its source, give sha256="
            raise ValueError(f"not a zip archive of torch.save, which has checksums; {advice}")
        found = hashlib.sha256(data).hexdigest()
        if sha256 is not None and found != sha256.lower():
            raise ValueError(f"its SHA-256 is {found}, not the one given")
        loaded = unpacked(checked_archive(data) if archive else data)
        return tensors_of(entry_of(loaded, key), size)


def unpacked(data: bytes) -> Any:
    """Return the tensors and dicts of bytes that were checked, or whose SHA-256 was given."""
    try:
        # The one place that reads a pickle: by explicit call, and weights_only.
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)  # noqa: TID251
    except Exception as error:  # its message advises to load the file unprotected
        name = re.search(r"GLOBAL (\S+)", str(error))
        unreadable = f"torch cannot read it ({type(error).__name__})"
        raise ValueError(not_loaded(name[1]) if name else unreadable) from None


def not_loaded(name: str) -> str:
    """The message for a name in a pickle that no state dict has."""
    return f"holds {name!r:.80}, which is not loaded: only tensors in dicts are"


def checked_archive(data: bytes) -> bytes:
    """Return a new archive of the members, whose checksums and sizes are checked."""
    clean = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(clean, "w") as copy:
        members = archive.infolist()
        check_members(members, len(data))
        for member in members:
            content = archive.read(member)  # checks the CRC-32, and refuses an encrypted member
            if member.filename.endswith("/data.pkl"):
                check_pickle(content)
            copy.writestr(zipfile.ZipInfo(member.filename), content)
    return clean.getvalue()


def check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    """Refuse archives that torch.save does not write: compressed or ambiguous."""
    if len(members) > MEMBERS:
        raise ValueError(f"an archive must have at most {MEMBERS:,} members; got {len(members):,}")
    for member in members:
        name = member.filename
        if not re.fullmatch(r"[\w .+=@-]+(/[\w .+=@-]+)+", name, re.ASCII) or "/.." in f"/{name}":
            raise ValueError(f"a member must have a plain name in a folder; got {name!r:.80}")
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise ValueError(f"member {name!r:.80} is compressed; torch.save does not compress")
    names = [member.filename.casefold() for member in members]
    if len(set(names)) < len(names):
        raise ValueError("members must have distinct names")
    (folder, *others) = {name.split("/")[0] for name in names} or {""}
    if others or f"{folder}/data.pkl" not in names:
        raise ValueError("not a file of torch.save: it must be one folder with data.pkl")
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise ValueError("a TorchScript program, not weights")
    if any(member.file_size > PICKLE for member in members if member.filename.endswith(".pkl")):
        raise ValueError(f"its data.pkl is larger than {PICKLE:,} bytes")
    if sum(member.file_size for member in members) > size:
        raise ValueError("its members are larger than the file")


def check_pickle(content: bytes) -> None:
    """Refuse a pickle with names that no state dict has. Runs none of it."""
    for k, (operation, argument, _) in enumerate(genops(content)):
        if k > OPERATIONS:
            raise ValueError(f"data.pkl has more than {OPERATIONS:,} operations")
        if operation.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"data.pkl has the operation {operation.name}, not of torch.save")
        if operation.name == "GLOBAL" and not NAMES.fullmatch(str(argument)):
            raise ValueError(not_loaded(str(argument).replace(" ", ".")))


def entry_of(loaded: Any, key: str | None) -> dict[Any, Any]:
    """Return the dict under `key`, or the whole one."""
    if key is not None and isinstance(loaded, dict):
        names = [name for name in loaded if isinstance(name, str)]
        if key not in loaded:
            there = ", ".join(names[:10])
            raise ValueError(f"has no {key!r}{near(key, names)}; it has {there:.300}")
        loaded = loaded[key]
    if not isinstance(loaded, dict):
        what = "the file" if key is None else repr(key)
        raise ValueError(f"{what} must hold a dict of tensors; got a {type(loaded).__name__}")
    return loaded


def tensors_of(found: dict[Any, Any], size: int) -> dict[str, Tensor]:
    """Return contiguous copies of the entries, which must be plain tensors of finite numbers."""
    dicts = [k for k, v in found.items() if isinstance(k, str) and dict_of_tensors(v)]
    for name, value in found.items():
        if not isinstance(name, str) or not name.isprintable() or len(name) > 200:
            raise ValueError(f"names must be printable, of 200 letters at most; got {name!r:.80}")
        if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided:
            hint = f"; give the key of a dict: {', '.join(dicts[:10]):.300}" if dicts else ""
            raise ValueError(f"{name!r} must be a tensor; got a {type(value).__name__}{hint}")
        if value.dtype not in storage.DTYPES.values():
            raise ValueError(f"tensor {name!r} has the unknown dtype {value.dtype}")
    if sum(value.nbytes for value in found.values()) > 2 * size + SLACK:  # tied weights: twice
        raise ValueError(f"its tensors take more than twice the {size:,} bytes of the file")
    tensors = storage.copies(found)
    storage.check_numbers(tensors)
    return tensors


def dict_of_tensors(value: Any) -> bool:
    """True for a dict with a tensor in it."""
    return isinstance(value, dict) and any(isinstance(one, Tensor) for one in value.values())


def rename(tensors: Mapping[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    """Replace the prefix `old` by `new` in the names of tensors that have it.

    Raises:
        ValueError: if no name has it, or if two tensors would have one name.
    """
    if not any(name.startswith(old) for name in tensors):
        raise ValueError(f"no tensor begins with {old!r:.80}{near(old, tensors)}")
    made = {new + name.removeprefix(old) if name.startswith(old) else name: value
            for name, value in tensors.items()}  # fmt: skip
    if len(made) < len(tensors):
        raise ValueError(f"{old!r:.80} -> {new!r:.80} gives two tensors one name")
    return made
