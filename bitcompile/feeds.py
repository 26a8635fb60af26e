"""Inputs for a model nobody described: every size a graph leaves open is chosen, none is known.

A dimension's name ties it to those of the same name; ``past + seq``, as torch writes it, is the sum
of two others. The length of an attention mask often has a name of its own: an open size that no
other input has may be the sum of all others but the batch. Not every graph takes a batch of two,
and few say so; :func:`candidates` gives what to try, likeliest first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

SIZE = 2
"""What an open size is if nothing else is known."""
PAST = 3
"""A size that others are added to, so that a sum differs from twice a part."""
FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
"""Types of inputs that are random."""
ONES: dict[str, type[np.generic]] = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
"""Types of inputs that are all ones."""


class NoFeeds(Exception):  # noqa: N818 it is a reason, and caught where it can be told
    """Why no inputs could be made."""


def candidates(session: Any) -> Iterator[dict[str, Any]]:
    """Feeds for an onnxruntime session; raises NoFeeds for an input of another type."""
    inputs = session.get_inputs()
    for batch in (SIZE, 1):
        for summed in (False, True):
            sizes = _sizes(inputs, batch, summed)
            yield {i.name: _values(i, sizes) for i in inputs}


def _sizes(inputs: Any, batch: int, summed: bool) -> dict[str, int]:
    """Size of every named dimension."""
    where: dict[str, set[str]] = {}
    for declared in inputs:
        for name in filter(_is_name, declared.shape):
            where.setdefault(name, set()).add(declared.name)
    first = {declared.shape[0] for declared in inputs if declared.shape}
    plain = [name for name in where if "+" not in name]
    sizes = dict.fromkeys(plain, SIZE) | {name: batch for name in plain if name in first}
    caches = [i.shape[2] for i in inputs if len(i.shape) == 4 and _is_name(i.shape[2])]
    sizes |= {name: PAST for name in caches if name in sizes and name not in first}
    alone = [name for name in plain if len(where[name]) == 1 and name not in first]
    if summed and caches and alone:
        others = sum(sizes[name] for name in plain if name not in first and name not in alone)
        # The tokens' own length is alone too if the mask's is: the longer of the two is the mask's.
        tokens = SIZE if len(alone) > 1 else 0
        sizes[alone[-1]] = others + tokens
    return sizes | {name: _sum(name, sizes) for name in where if "+" in name}


def _is_name(size: Any) -> bool:
    return isinstance(size, str)


def _sum(name: str, sizes: Mapping[str, int]) -> int:
    parts = (part.strip() for part in name.split("+"))
    return sum(int(part) if part.isdigit() else sizes.get(part, SIZE) for part in parts)


def _values(declared: Any, sizes: Mapping[str, int]) -> Any:
    shape = [dim if isinstance(dim, int) else sizes.get(dim, SIZE) for dim in declared.shape]
    if declared.type in FLOATS:
        return np.random.default_rng(0).standard_normal(shape).astype(FLOATS[declared.type])
    if declared.type not in ONES:
        raise NoFeeds(f"input {declared.name!r} is {declared.type}")
    return np.ones(shape, ONES[declared.type])
