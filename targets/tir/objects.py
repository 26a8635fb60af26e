"""Compiling PrimFuncs to plain C-ABI object files, free of any TVM runtime symbol."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm
from tvm import s_tir, tirx


def _passes() -> list[Any]:
    """TVM's lowering without MakePackedAPI, and without LowerTVMBuiltin.

    The latter would turn local arrays of 1 KiB and more into runtime workspace calls.
    """
    t, s = tirx.transform, s_tir.transform
    return [
        s.CanonicalizeLoop(),
        s.LowerInitBlock(),
        s.PlanAndUpdateBufferAllocationLocation(),
        s.ConvertBlocksToOpaque(),
        s.CompactBufferAllocation(),
        s.LowerMatchBuffer(),
        s.StmtSimplify(),
        s.LowerOpaqueBlock(),
        t.FlattenBuffer(),
        t.NarrowDataType(32),
        s.LoopPartition(),
        t.VectorizeLoop(True),
        t.StorageRewrite(),
        s.HoistIfThenElse(),
        t.UnrollLoop(),
        s.RenormalizeSplitPattern(),
        t.StmtSimplify(),
        t.RemoveNoOp(),
        s.RewriteUnsafeSelect(),
        t.CommonSubexprElim(),
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
    lowered = tvm.ir.transform.Sequential(_passes())(module)
    built = tvm.get_global_func("target.build.llvm")(lowered, goal)
    built.write_to_file(str(path))
    return built
