"""Spoiling valid inputs: bytes, and JSON documents.

Edits are drawn from a ``random.Random``: case n of a seed is always the same, and drawing costs
microseconds where reading an input costs milliseconds.
"""

from __future__ import annotations

import json
from random import Random
from typing import Any

EDGES = (0, 1, 2, 3, 7, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256, 1023, 4096, 65535, 65536)
HUGE = tuple(
    base + offset for base in (1 << 31, 1 << 32, 1 << 62, 1 << 63, 1 << 64) for offset in (-1, 0, 1)
)
SIZES = (1, 1, 2, 4, 8, 8, 16, 100, 5000)
"""Bytes of an edit."""
IN_PLACE = ("set", "number", "number", "flip", "swap")
MOVING = ("cut", "drop", "repeat")
SHALLOW = 4096
"""Bytes at the beginning of a file in which most edits lie."""
DEEP = "\ue000"
"""Stands for a value nested deeper than a parser can recurse."""
DEPTH = 20000
WORDS = (
    "",
    "\x00",
    "..",
    "/etc/passwd",
    "../x",
    "1.2.3",
    "float32",
    "\ud800",
    "a\nb",
    "x" * 300,
    DEEP,
)
FLOATS = (0.0, -0.0, 0.5, -1.5, 1e-300, 1e300, float("inf"), float("-inf"), float("nan"))


def integer(draw: Random) -> int:
    """An integer, often where something ends."""
    kind = draw.randrange(4)
    if kind == 0:
        return draw.choice(EDGES)
    if kind == 1:
        return draw.choice(HUGE) * draw.choice((1, 1, -1))
    return draw.randrange(-300, 300) if kind == 2 else draw.getrandbits(70) - (1 << 69)


def small(value: int) -> int:
    """``value`` within int64."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def spoil(draw: Random, data: bytes, focus: int = SHALLOW) -> bytes:
    """``data`` after one to four edits, most of them in its first ``focus`` bytes.

    Two files of three keep everything at its place, else few are read beyond their beginning.
    """
    result = bytearray(data)
    kinds = IN_PLACE if draw.random() < 0.67 else IN_PLACE + MOVING
    for _ in range(draw.choice((1, 1, 2, 4))):
        span = min(focus, len(result)) if draw.random() < 0.8 else len(result)
        at = draw.randrange(max(span, 1))
        _edit(draw, draw.choice(kinds), result, at)
    return bytes(result)


def _edit(draw: Random, kind: str, data: bytearray, at: int) -> None:
    part = data[at : at + draw.choice(SIZES)]
    if kind == "set":
        part = bytearray([draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))]) * len(part)
    elif kind == "number":
        number = integer(draw) & ((1 << 8 * len(part)) - 1)
        part = bytearray(number.to_bytes(len(part), "little"))
    elif kind == "flip" and part:
        part[0] ^= 1 << draw.randrange(8)
    elif kind == "swap":
        part = part[::-1]
    elif kind == "repeat":
        part = part * draw.randrange(2, 6)
    elif kind == "drop":
        part = bytearray()
    if kind == "cut":
        del data[at:]
    else:
        data[at : at + len(part) if kind in IN_PLACE else at + 8] = part


def value(draw: Random, depth: int = 2) -> Any:
    """Any JSON value, some nested."""
    kind = draw.randrange(8 if depth else 6)
    if kind < 2:
        return integer(draw)
    if kind == 2:
        return draw.choice((None, True, False))
    if kind == 3:
        return draw.choice(FLOATS)
    if kind < 6:
        return draw.choice(WORDS)
    items = [value(draw, depth - 1) for _ in range(draw.randrange(4))]
    return items if kind == 6 else {str(i): item for i, item in enumerate(items)}


def spoil_json(draw: Random, document: Any) -> bytes:
    """The text of ``document`` after one to three edits anywhere; sometimes no JSON at all."""
    whole = [json.loads(json.dumps(document))]
    for _ in range(draw.choice((1, 1, 2, 3))):
        places = _places(whole)
        if not places:
            break
        holder, key = draw.choice(places)
        kind = draw.choice(("set", "set", "set", "copy", "drop", "add"))
        if kind == "drop":
            del holder[key]
        elif kind == "copy":
            other, name = draw.choice(places)
            holder[key] = json.loads(json.dumps(other[name]))
        elif kind == "add" and isinstance(holder[key], dict):
            holder[key][str(value(draw, 0))[:20]] = value(draw)
        else:
            holder[key] = value(draw)
    text = json.dumps(whole[0]) if whole else ""
    text = text.replace(json.dumps(DEEP), "[" * DEPTH + "]" * DEPTH)
    data = text.encode("utf-8", "surrogatepass")
    return spoil(draw, data, len(data)) if draw.random() < 0.15 else data


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every holder and key in a document, outermost first."""
    found: list[tuple[Any, Any]] = []
    keys: Any = range(len(value)) if isinstance(value, list) else list(value)
    for key in keys:
        found.append((value, key))
        if isinstance(value[key], list | dict):
            found += _places(value[key])
    return found
