"""The plugin's launch functions (``cuda_launch.h``) from Python, on torch's memory."""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tests.gpu.jobs import NO_GATE, LinearJob, TableJob

MMA_TILE = -1
TYPES = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16}
VARIANTS = json.loads(Path(__file__).with_name("variants.json").read_text())
"""What ``tile`` numbers from 1 on: tokens of ``tiles``; ``longest``: row of the kernel for one."""


class Launcher:
    """A library with ``bc_cuda_*``; raises RuntimeError with its reasons."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.bc_cuda_open.restype = ctypes.c_char_p
        self.library.bc_cuda_gpu.restype = ctypes.c_void_p
        self.library.bc_cuda_error.restype = ctypes.c_char_p
        self.library.bc_cuda_linear_scratch.restype = ctypes.c_int64
        self.library.bc_cuda_head_scratch.restype = ctypes.c_int64
        self._refuse(self.library.bc_cuda_open())
        torch.zeros(1, device="cuda")  # makes the context current
        reason = ctypes.c_char_p()
        self.gpu = ctypes.c_void_p(self.library.bc_cuda_gpu(ctypes.byref(reason)))
        self._refuse(reason.value)

    @staticmethod
    def _refuse(reason: bytes | None) -> None:
        if reason:
            raise RuntimeError(reason.decode())

    def _check(self, result: int) -> None:
        if result:
            self._refuse(self.library.bc_cuda_error(result))

    def gates(self, job: LinearJob) -> bool:
        """``bc_cuda_gates``."""
        return bool(self.library.bc_cuda_gates(self.gpu, ctypes.byref(job)))

    def scratch_bytes(self, job: LinearJob) -> int:
        """``bc_cuda_linear_scratch``."""
        return int(self.library.bc_cuda_linear_scratch(self.gpu, ctypes.byref(job)))

    def linear(self, job: LinearJob, scratch: torch.Tensor | None) -> None:
        """``bc_cuda_linear`` on torch's current stream."""
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        at = ctypes.c_void_p(scratch.data_ptr() if scratch is not None else None)
        self._check(self.library.bc_cuda_linear(self.gpu, stream, ctypes.byref(job), at))

    def head_scratch(self, job: TableJob) -> torch.Tensor:
        """Room for ``head``, full of what is no result."""
        size = self.library.bc_cuda_head_scratch(ctypes.byref(job))
        return torch.full((size,), 0x5A, dtype=torch.uint8, device="cuda")

    def head(self, job: TableJob, scratch: torch.Tensor) -> None:
        """``bc_cuda_head`` on torch's current stream."""
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        at = ctypes.c_void_p(scratch.data_ptr())
        self._check(self.library.bc_cuda_head(self.gpu, stream, ctypes.byref(job), at))

    def read(self, data: torch.Tensor, out: torch.Tensor) -> None:
        """``bc_cuda_read`` on torch's current stream."""
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (data, out)]
        size = ctypes.c_int64(data.numel() * data.element_size())
        self._check(self.library.bc_cuda_read(self.gpu, stream, pointers[0], size, pointers[1]))


@dataclass
class Linear:
    """One product: its tensors stay alive with it."""

    x: torch.Tensor
    w: torch.Tensor
    w_scale: torch.Tensor
    shape: tuple[int, int]
    """``(N, K)`` of the result and the input of one gate."""
    out_type: torch.dtype
    gamma: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    eps: float = 1e-5
    gate_in: int = NO_GATE
    gate_out: int = NO_GATE
    group_size: int = 0
    early: int = 0
    quantised: int = 0
    step: int = 0
    tile: int = 0
    split: int = 0
    y: torch.Tensor | None = None

    def job(self) -> LinearJob:
        """The structure that the library takes."""
        N, K = self.shape
        M = self.x.shape[0]
        if self.y is None:
            self.y = torch.full((M, N), float("nan"), dtype=self.out_type, device="cuda")
        pointers: dict[str, Any] = {
            name: None if (t := getattr(self, name)) is None else t.data_ptr()
            for name in ("x", "gamma", "w", "w_scale", "bias", "residual", "y")
        }
        return LinearJob(
            **pointers, M=M, N=N, K=K, type_x=TYPES[self.x.dtype], type_y=TYPES[self.out_type],
            gate_in=self.gate_in, gate_out=self.gate_out,
            group_size=self.group_size, eps=self.eps, early=self.early,
            quantised=self.quantised, step=self.step, tile=self.tile,
            split=self.split,
        )  # fmt: skip

    def scratch(self, launcher: Launcher) -> torch.Tensor:
        """Scratch memory for it; poisoned."""
        size = max(1, launcher.scratch_bytes(self.job()))
        return torch.full((size,), 0x5A, dtype=torch.uint8, device="cuda")

    def changed(self, **fields: Any) -> Linear:
        """Another one, with a result of its own unless given."""
        return replace(self, **{"y": None, **fields})
