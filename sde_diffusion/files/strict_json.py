"""Text from files: strict JSON, and messages of one printable line."""

import json
import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

__all__ = ["json_text", "near", "parsed", "plain", "printable"]

LIMIT = 4 * 2**20  # bytes

DEPTH = 20  # brackets within brackets

BRACKETS = 100_000  # in all

VALUES = 100_000  # in all: a header of 10,000 tensors has about 80,000

DIGITS = 40  # of an integer; a seed has up to 39


def parsed(data: bytes) -> dict[str, Any]:
    """Parse a JSON object: UTF-8, finite numbers, distinct names, limited sizes; or ValueError."""
    if len(data) > LIMIT:
        raise ValueError(f"more than {LIMIT:,} bytes")
    if data.count(b"[") + data.count(b"{") > BRACKETS:
        raise ValueError(f"more than {BRACKETS:,} lists and objects")
    if data.count(b",") > VALUES:
        raise ValueError(f"more than {VALUES:,} values")
    try:
        value = json.loads(data.decode(), object_pairs_hook=distinct, parse_int=parse_integer,
                           parse_float=finite_number, parse_constant=finite_number)  # fmt: skip
        if depth(value) > DEPTH:
            raise ValueError(f"nested more than {DEPTH} deep")
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"not JSON ({error})") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object; got {json_text(value)}")
    return value


def depth(value: Any) -> int:
    """Return the number of brackets around the innermost value."""
    parts = value.values() if isinstance(value, dict) else value
    return 1 + max(map(depth, parts), default=0) if isinstance(value, dict | list) else 0


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
    """Return a value as JSON, cut to 80 characters."""
    return f"{json.dumps(value):.80}"


def printable(text: str, most: int = 2000) -> str:
    """Return one line that cannot control a terminal: other characters become escapes."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: most + 1])
    return text if len(text) <= most else text[:most] + " ..."
