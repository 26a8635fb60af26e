"""Inputs made up for graphs: sizes that belong together, types, and what cannot be made."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bitcompile.feeds import NoFeeds, candidates


def session(**inputs: tuple[list[Any], str]) -> Any:
    declared = [
        SimpleNamespace(name=name, shape=shape, type=f"tensor({kind})")
        for name, (shape, kind) in inputs.items()
    ]
    return SimpleNamespace(get_inputs=lambda: declared)


def shapes(made: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in made.items()}


CACHE = (["b", 2, "past", 16], "float")


@pytest.mark.parametrize("total", ["past + seq", "total"])
def test_a_mask_is_as_long_as_cache_and_tokens(total: str) -> None:
    ids, mask = (["b", "seq"], "int64"), (["b", total], "int64")
    tried = [shapes(m) for m in candidates(session(ids=ids, mask=mask, key=CACHE, value=CACHE))]
    wanted = {"ids": (2, 2), "mask": (2, 5), "key": (2, 2, 3, 16), "value": (2, 2, 3, 16)}
    assert wanted in tried
    assert any(t["ids"] == (1, 2) and t["mask"] == (1, 5) for t in tried)


def test_open_sizes_without_a_name_are_small() -> None:
    made = next(iter(candidates(session(x=([None, 7], "float"), n=([], "bool")))))
    assert shapes(made) == {"x": (2, 7), "n": ()}
    assert made["x"].dtype == np.float32
    assert made["n"].all()


def test_text_cannot_be_made_up() -> None:
    with pytest.raises(NoFeeds, match=r"input 'x' is tensor\(string\)"):
        next(iter(candidates(session(x=(["b"], "string")))))
