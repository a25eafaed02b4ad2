"""Text from files: strict JSON, and messages of one printable line."""

import json
import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from types import NoneType
from typing import Any

__all__ = ["json_text", "near", "parsed", "plain", "printable"]

LIMIT = 4 * 2**20  # bytes

DEPTH = 20  # brackets within brackets

BRACKETS = 100_000  # in all

DIGITS = 40  # of an integer; a seed has up to 39


def parsed(data: bytes) -> Any:
    """Parse JSON: UTF-8, finite numbers, distinct names, limited sizes; or raise ValueError."""
    if len(data) > LIMIT:
        raise ValueError(f"more than {LIMIT:,} bytes")
    if data.count(b"[") + data.count(b"{") > BRACKETS:
        raise ValueError(f"more than {BRACKETS:,} lists and objects")
    try:
        kinds = {
            "parse_int": parse_integer,
            "parse_float": finite_number,
            "parse_constant": finite_number,
        }
        value = json.loads(data.decode(), object_pairs_hook=distinct, **kinds)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"not JSON ({error})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEPTH):
        parts = [v.values() if isinstance(v, dict) else v for v in level]
        level = [v for part in parts for v in part if isinstance(v, dict | list)]
    if level:
        raise ValueError(f"nested more than {DEPTH} deep")
    return value


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of pairs with distinct names; of equal names json would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the name {twice!r:.80} occurs twice")
    return found


def parse_integer(digits: str) -> int:
    """Parse an integer of limited length."""
    if len(digits) > DIGITS:
        raise ValueError(f"an integer of {len(digits):,} digits")
    return int(digits)


def finite_number(digits: str) -> float:
    """Parse a finite number."""
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"numbers must be finite; got {digits:.20}")
    return value


def plain(value: Any) -> Any:
    """Convert a value to what it is after a round trip through JSON; inf and nan become strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value


def near(word: str, words: Iterable[str]) -> str:
    """Return " (did you mean ...?)" for the nearest of `words`, or "". Bounded in time."""
    short = [one for one, _ in zip(words, range(200), strict=False) if len(one) <= 100]
    found = get_close_matches(word, short, 1) if len(word) <= 100 else []
    return f" (did you mean {found[0]!r}?)" if found else ""


def json_text(value: Any) -> str:
    """Return the kind of a JSON value and the value itself, cut to 80 characters."""
    kinds = {bool: "", int: "the number ", float: "the number ", str: "the string ",
             list: "the list ", dict: "the object ", NoneType: ""}  # fmt: skip
    return f"{kinds.get(type(value), '')}{json.dumps(value):.80}"


def printable(text: str, most: int = 2000) -> str:
    """Return one line that cannot control a terminal: other characters become escapes."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: most + 1])
    return text if len(text) <= most else text[:most] + " ..."
