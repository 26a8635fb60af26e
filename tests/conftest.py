from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

import bitcompile
from bitcompile.artifact import Artifact
from tests.embedding import MODEL


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Artifact]:
    """The embedded model built for a target, once a session."""
    folder = tmp_path_factory.mktemp("embedded")

    @cache
    def build(target: str) -> Artifact:
        return bitcompile.build(MODEL, target, out=folder / target, verify=False)

    return build
