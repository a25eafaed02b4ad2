"""Objects as JSON and back, by fixed tables of classes and the annotations of their constructors.

Nothing is imported by name, and nothing is called but the classes of a table.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import cached_property
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from torch import nn

from sde_diffusion.files.strict_json import json_text, near, plain

__all__ = ["class_and_arguments", "from_record", "public", "same", "to_record"]


def to_record(value: Any) -> dict[str, Any]:
    """Convert a dataclass instance to JSON."""
    if not is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"a saved part must be a dataclass instance; got {value!r:.80}")
    names = {field.name for field in fields(value)}
    for name in vars(value):
        cached = isinstance(getattr(type(value), name, None), cached_property)
        if not (name in names or name.startswith("_") or cached or isinstance(value, nn.Module)):
            kind = type(value).__name__
            raise TypeError(f"{kind} must be a dataclass with all its attributes; got {name!r}")
    return {"class": type(value).__name__, **asdict(value)}


def public(module: Any) -> list[type]:
    """Return the public classes of a module that `from_record` can make."""
    named = [getattr(module, name) for name in module.__all__]
    kinds = [made for made in named if isinstance(made, type) and not inspect.isabstract(made)]
    return [made for made in kinds if is_dataclass(made) or issubclass(made, nn.Module)]


def from_record(kind: str, classes: Sequence[type], description: Any, given: Any = None) -> Any:
    """Make the object of these classes that a description names, or return `given` if it fits."""
    if given is None:
        made, arguments = class_and_arguments(kind, classes, description)
        given = made(**arguments)
    same(kind, description, to_record(given))
    return given


def class_and_arguments(
    kind: str, classes: Sequence[type], description: Any, added: Mapping[str, Any] | None = None
) -> tuple[type, dict[str, Any]]:
    """Return the class that a description names and the arguments of its constructor.

    Args:
        kind: the part described, for messages.
        classes: those allowed.
        description: JSON.
        added: arguments that older files lack, with the values that they had then.
    """
    check_object(kind, description)
    arguments = dict(description)
    if "class" not in arguments:
        raise ValueError(f"{kind} has no 'class'{near('class', arguments)}")
    name, names = arguments.pop("class"), [made.__name__ for made in classes]
    if name not in names:
        guess = near(str(name), names)
        raise ValueError(f"unknown {kind} class {name!r:.80}{guess}; if it is yours, pass {kind}=")
    made = classes[names.index(name)]
    takes = inspect.signature(made, eval_str=True).parameters
    for argument in arguments:
        if argument not in takes:
            raise ValueError(f"{name} has no argument {argument!r:.80}{near(argument, takes)}")
    arguments = {**{n: v for n, v in (added or {}).items() if n in takes}, **arguments}
    for argument, parameter in takes.items():
        if argument not in arguments:
            raise ValueError(f"{kind} {name} has no {argument!r}: its record is not complete")
        if not matches_type(arguments[argument], parameter.annotation):
            raise ValueError(f"{argument} of {name} must not be {json_text(arguments[argument])}")
    return made, arguments


def same(kind: str, saved: Any, ours: Mapping[str, Any]) -> None:
    """Refuse a description that differs from the saved one, listing the differences."""
    check_object(kind, saved)
    old, new = ({name: text(value) for name, value in d.items()} for d in (saved, ours))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    changes = [f"{n} {old.get(n, 'absent'):.80} -> {new.get(n, 'absent'):.80}" for n in names[:5]]
    if changes:
        raise ValueError(f"the {kind} was saved as another: {', '.join(changes)}")


def check_object(kind: str, description: Any) -> None:
    """Refuse anything but a JSON object."""
    if not isinstance(description, dict):
        raise ValueError(f"{kind} must be described by an object; got {json_text(description)}")


def text(value: Any) -> str:
    """Return the same text for equal values: 20 and 20.0 are one number."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(text, value))}]"
    return json.dumps(plain(value), sort_keys=True)


def matches_type(value: Any, hint: Any) -> bool:
    """True if a value from JSON has the annotated type. True, "1" and 1.0 are not the integer 1."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return matches_type(value, inside[0])
    if origin in (Union, UnionType):
        return any(matches_type(value, one) for one in inside)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inside)
    if origin in (tuple, list, Sequence):
        if not isinstance(value, list):
            return False
        fixed = origin is tuple and Ellipsis not in inside
        hints = inside if fixed else inside[:1] * len(value)
        return len(value) == len(hints) and all(map(matches_type, value, hints))
    if type(value) is int and not -(2**63) <= value < 2**63:
        return False
    return type(value) in ((int, float) if hint is float else (hint,))
