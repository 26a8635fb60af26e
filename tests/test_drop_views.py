"""drop-views: chains that undo themselves go, chains that move anything stay."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from bitcompile.passes.drop_views import DropViews
from bitcompile.passing import run
from tests.graphs import Build, Dims, input_names, node_of, ops, run_model, views

FEEDS = {"x": np.arange(2 * 3 * 48, dtype=np.float32).reshape(2, 3, 48)}


def test_the_trace_around_attention_vanishes() -> None:
    def graph() -> ir.Model:
        b = Build()
        x = b.input("x", ["b", "s", 48])
        return b.model(b.op("Neg", views(b, x, 3, 16), name="y"))

    model = graph()
    (record,) = run(model, [DropViews()])
    assert record.modified
    assert ops(model) == ["Neg"]
    assert input_names(node_of(model, "Neg")) == ["x"]
    np.testing.assert_array_equal(run_model(model, FEEDS)[0], run_model(graph(), FEEDS)[0])


Step = tuple[str, list[int], Dims]
SPLIT: Step = ("Reshape", [0, 0, 3, 16], ["b", "s", 3, 16])
FLAT: Step = ("Reshape", [0, 0, -1], ["b", "s", 48])
SWAP: Step = ("Transpose", [0, 2, 1, 3], ["b", 3, "s", 16])


def chain(steps: list[Step], source: Dims = ("b", "s", 48)) -> ir.Model:
    b = Build()
    y = b.input("x", source)
    for i, (op, numbers, shape) in enumerate(steps):
        if op == "Transpose":
            y = b.op(op, y, name=f"v{i}", shape=shape, perm=numbers)
        elif op == "Cast":
            y = b.op(op, y, name=f"v{i}", shape=shape, to=1)
        elif op == "Identity":
            y = b.op(op, y, name=f"v{i}", shape=shape)
        else:
            y = b.op(op, y, b.const(f"c{i}", np.array(numbers)), name=f"v{i}", shape=shape)
    return b.model(b.op("Neg", y, name="y"))


@pytest.mark.parametrize(
    "steps",
    [
        [SPLIT, FLAT],
        [("Reshape", [0, 0, 12, 4], ["b", "s", 12, 4]), SPLIT, FLAT],
        [("Unsqueeze", [2], ["b", "s", 1, 48]), ("Squeeze", [2], ["b", "s", 48])],
        [("Transpose", [1, 0, 2], ["s", "b", 48]), ("Transpose", [1, 0, 2], ["b", "s", 48])],
        [("Identity", [], ["b", "s", 48]), ("Cast", [], ["b", "s", 48])],
        [SPLIT, SWAP, ("Transpose", [0, 2, 1, 3], ["b", "s", 3, 16]), FLAT],
    ],
)
def test_identities(steps: list[Step]) -> None:
    model = chain(steps)
    expected = run_model(model, FEEDS)[0]
    run(model, [DropViews()])
    assert ops(model) == ["Neg"]
    np.testing.assert_array_equal(run_model(model, FEEDS)[0], expected)


@pytest.mark.parametrize(
    "steps",
    [
        [SPLIT],  # another shape
        [SPLIT, SWAP, ("Reshape", [0, 0, -1], ["b", 3, "rest"])],
        [  # heads and their elements change places; the shape comes back
            SPLIT,
            ("Transpose", [0, 1, 3, 2], ["b", "s", 16, 3]),
            FLAT,
        ],
        [("Transpose", [1, 0, 2], ["s", "b", 48]), ("Identity", [], ["s", "b", 48])],
        [("Reshape", [0, 0, -1], [None, None, 48])],
    ],
)
def test_what_moves_or_is_not_known_stays(steps: list[Step]) -> None:
    model = chain(steps)
    expected = run_model(model, FEEDS)[0]
    run(model, [DropViews()])
    assert len(model.graph) > 1
    np.testing.assert_array_equal(run_model(model, FEEDS)[0], expected)


def test_equal_axes_that_change_places_stay() -> None:
    """Sizes alone cannot tell a transpose of two equal axes from none."""
    model = chain([("Transpose", [1, 0, 2], [3, 3, 48])], source=[3, 3, 48])
    (record,) = run(model, [DropViews()])
    assert not record.modified


def test_no_elements_at_all() -> None:
    none: list[Step] = [("Reshape", [0, 2, 2], [0, 2, 2]), ("Reshape", [0, 4], [0, 4])]
    model = chain(none, source=[0, 4])
    run(model, [DropViews()])
    assert run_model(model, {"x": np.zeros((0, 4), np.float32)})[0].shape == (0, 4)


def test_only_the_inner_part_of_a_chain_goes() -> None:
    back: Step = ("Transpose", [0, 2, 1, 3], ["b", "s", 3, 16])
    model = chain([SPLIT, SWAP, back, SWAP])
    expected = run_model(model, FEEDS)[0]
    run(model, [DropViews()])
    assert ops(model) == ["Reshape", "Transpose", "Neg"]
    np.testing.assert_array_equal(run_model(model, FEEDS)[0], expected)


def test_an_output_of_the_model_keeps_its_node() -> None:
    b = Build()
    model = b.model(b.op("Identity", b.input("x", ["b", "s", 48]), name="y"))
    (record,) = run(model, [DropViews()])
    assert not record.modified
