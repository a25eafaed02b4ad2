"""Words for processes and samplers: names on the command line, in tests and in tables."""

import re
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

__all__ = ["by_word", "check", "word"]


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


def check(flag: str, given: str, known: Iterable[str]) -> None:
    """Refuse a word that is not known, and name those that are near it."""
    known = list(known)
    if given not in known:
        near = [name for name in known if name.startswith(given)] if given else []
        near = near or get_close_matches(given, known, n=3, cutoff=0.5)
        listed = ", ".join((near or known)[:8])
        hint = "near it" if near else "known"
        raise ValueError(f"{flag} must be a known name; got {given}; {hint}: {listed}")
