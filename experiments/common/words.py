"""Words for processes and samplers: names on the command line, in tests and in tables."""

import re
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

__all__ = ["by_word", "match", "word"]

MOST = 8  # names in a message


def word(value: Any) -> str:
    """Return the class in kebab-case, then each setting that differs from its default.

    VP() is "vp", SubVP() "sub-vp", Ancestral("beta") "ancestral-beta", Adams(1) "adams-k-1",
    Churn(Heun()) "churn-heun". Long tables, such as a chain's betas, are left out.
    """
    name = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", type(value).__name__)
    parts = [name.lower()]
    for field in fields(value):
        setting = getattr(value, field.name)
        if setting == field.default or isinstance(setting, tuple):
            continue
        if isinstance(setting, str):
            parts.append(setting)
        elif isinstance(setting, int | float):
            parts.append(f"{field.name.replace('_', '-')}-{setting:g}")
        else:
            parts.append(word(setting))
    return "-".join(parts)


def by_word(values: tuple[Any, ...]) -> dict[str, Any]:
    """Return the values by their words."""
    return {word(value): value for value in values}


def match(flag: str, given: str, known: Iterable[str]) -> str:
    """Return the known name that equals `given` in any case; refuse others, with names near it."""
    names = {name.lower(): name for name in known}
    small = given.lower()
    if small in names:
        return names[small]
    near = [name for name in names if name.startswith(small)] if small else []
    near = near or get_close_matches(small, names, n=3, cutoff=0.5)
    near = near if len(names) > MOST else []
    listed = [names[name] for name in near or names]
    shown = ", ".join(listed[:MOST] + ["..."] * (len(listed) > MOST))
    hint = "near it" if near else "known"
    raise ValueError(f"{flag} must be a known name; got {given}; {hint}: {shown}")
