"""Files: safetensors for numbers, JSON for words, SHA-256 to notice damage, rename to be whole.

Nothing read from a file is executed: class names are looked up in fixed tables.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

__all__ = ["BadFile", "build", "describe", "public", "read", "write"]

FORMAT = 2
OURS = ("format", "sha256", "record_sha256")  # what `write` adds to a record


class BadFile(ValueError):
    """A file that cannot be used; the message names it and says why, in one line."""


def write(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write path (.safetensors) and its JSON: both, or neither where the disk refuses.

    A kill between the two renames leaves a pair that `read` refuses; a checkpoint, which is a
    folder renamed whole, does not have that instant.
    """
    from safetensors.torch import save

    taken = [name for name in OURS if name in record]
    if taken:
        raise ValueError(f"{', '.join(taken)}: a name that the record keeps for itself")
    data = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    record = {"format": FORMAT, "sha256": hashlib.sha256(data).hexdigest(), **record}
    record["record_sha256"] = fingerprint(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    words = (json.dumps(record, indent=1) + "\n").encode()
    replace_all({path: data, path.with_suffix(".json"): words})


def fingerprint(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record, however it is laid out as text."""
    rest = {name: value for name, value in record.items() if name != "record_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the record that `write` wrote, or BadFile."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data = path.read_bytes()
        record = json.loads(path.with_suffix(".json").read_bytes())
    except OSError as error:
        raise BadFile(f"{error.filename}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path.with_suffix('.json')}: not JSON ({error})") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise BadFile(f"{path.with_suffix('.json')}: not a record of format {FORMAT}")
    if record.get("record_sha256") != fingerprint(record):
        raise BadFile(f"{path.with_suffix('.json')}: damaged (its SHA-256 is not the recorded one)")
    if hashlib.sha256(data).hexdigest() != record.get("sha256"):
        raise BadFile(f"{path}: truncated or damaged (its SHA-256 is not the recorded one)")
    try:
        return load(data), record
    except (SafetensorError, ValueError) as error:
        raise BadFile(f"{path}: not a safetensors file ({error})") from None


def replace(path: Path, data: bytes) -> None:
    """Write a file beside `path`, flush it to the disk, and rename it over `path`."""
    replace_all({path: data})


def replace_all(contents: Mapping[Path, bytes]) -> None:
    """Write files beside their places, flush them to the disk, and only then rename them all."""
    temporaries = {path: path.with_name(path.name + ".part") for path in contents}
    try:
        for path, data in contents.items():
            with open(temporaries[path], "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
    except OSError:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)
        raise
    for path, temporary in temporaries.items():
        os.replace(temporary, path)


def describe(value: Any) -> dict[str, Any]:
    """A frozen dataclass as JSON."""
    if not is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"{type(value).__name__} must be a dataclass to be saved")
    return {"class": type(value).__name__, **asdict(value)}


def public(module: Any) -> list[type]:
    """The public classes of a module that `build` can make."""
    named = [getattr(module, name) for name in module.__all__]
    kinds = [made for made in named if isinstance(made, type)]
    return [made for made in kinds if is_dataclass(made) or issubclass(made, nn.Module)]


def build(kind: str, classes: Sequence[type], description: Any, given: Any = None) -> Any:
    """The inverse of `describe` for these classes; or `given`, if that is what it describes."""
    if given is not None:
        if json.loads(json.dumps(describe(given))) != description:
            raise ValueError(f"the {kind} was {description}; got {given}")
        return given
    arguments = dict(description)
    name = arguments.pop("class")
    made = next((made for made in classes if made.__name__ == name), None)
    if made is None:
        raise ValueError(f"unknown {kind} class {name!r} (if it is yours, pass {kind}=)")
    if is_dataclass(made):
        unknown = arguments.keys() - {field.name for field in fields(made)}
        if unknown:
            raise ValueError(f"{name} has no argument {', '.join(sorted(unknown))}")
    return made(**arguments)
