"""Compiling PrimFuncs to plain C-ABI object files, free of any TVM runtime symbol."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm
from tvm import s_tir, tirx


def lowering(text: bool = False) -> list[Any]:
    """TVM's lowering without MakePackedAPI, and without LowerTVMBuiltin.

    The latter would turn local arrays of 1 KiB and more into runtime workspace calls.
    ``text``: for a generator of a GPU's source text. It declares arrays with constant extents alone
    and finds the alignment of a vector load in its index, where a variable would hide it. And
    StorageRewrite would let two arrays of a work-group share memory by a liveness that knows of one
    work-item: another one may still read the first when this one stores to the second.
    """
    t, s = tirx.transform, s_tir.transform
    return [
        s.CanonicalizeLoop(),
        s.LowerInitBlock(),
        s.PlanAndUpdateBufferAllocationLocation(),
        s.ConvertBlocksToOpaque(),
        *([] if text else [s.CompactBufferAllocation()]),
        s.LowerMatchBuffer(),
        s.StmtSimplify(),
        s.LowerOpaqueBlock(),
        t.FlattenBuffer(),
        t.NarrowDataType(32),
        s.LoopPartition(),
        t.VectorizeLoop(True),
        *([] if text else [t.StorageRewrite()]),
        s.HoistIfThenElse(),
        t.UnrollLoop(),
        s.RenormalizeSplitPattern(),
        t.StmtSimplify(),
        t.RemoveNoOp(),
        s.RewriteUnsafeSelect(),
        *([] if text else [t.CommonSubexprElim()]),
        t.LowerIntrin(),
    ]


def compile_object(functions: Mapping[str, Any], target: Mapping[str, Any], path: Path) -> Any:
    """Write the object file of ``{symbol: PrimFunc}``; returns TVM's module (for its listings).

    ``target`` is a TVM target description of kind ``llvm``.
    """
    goal = tvm.target.Target(dict(target))
    module = tvm.IRModule(
        {
            symbol: function.with_attr(
                {"global_symbol": symbol, "target": goal, "tirx.noalias": True}
            )
            for symbol, function in functions.items()
        }
    )
    lowered = tvm.ir.transform.Sequential(lowering())(module)
    built = tvm.get_global_func("target.build.llvm")(lowered, goal)
    built.write_to_file(str(path))
    return built
