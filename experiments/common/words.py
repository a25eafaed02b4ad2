"""One word for each process and sampler: for flags, test names and tables."""

import re
from dataclasses import fields
from typing import Any

__all__ = ["by_word", "word"]


def word(value: Any) -> str:
    """The class in kebab-case, then each setting that is not the default.

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
    """The values by their words."""
    return {word(value): value for value in values}
