"""What the NVIDIA driver says about the GPU that onnxruntime takes, the first that is visible."""

from __future__ import annotations

import ctypes
from typing import Any

from bitcompile.errors import ToolchainError

COMPUTE_CAPABILITY_MAJOR = 75
"""Attribute of a device, of ``CUdevice_attribute``."""
LEAST_MAJOR = 8


class Card:
    """The GPU; raises ToolchainError without a driver or a GPU, or for one that is too old."""

    def __init__(self) -> None:
        try:
            self._driver = ctypes.CDLL("libcuda.so.1")
        except OSError:
            raise ToolchainError(
                "no NVIDIA driver (libcuda.so.1) on this machine: install it"
            ) from None
        self._device, major = ctypes.c_int(), ctypes.c_int()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(self._device), 0)
        text = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", text, len(text), self._device)
        self.name = text.value.decode("utf-8", "replace")
        attribute = COMPUTE_CAPABILITY_MAJOR
        self._call("cuDeviceGetAttribute", ctypes.byref(major), attribute, self._device)
        if major.value < LEAST_MAJOR:
            raise ToolchainError(
                f"{self.name} is too old: take a GPU of compute capability {LEAST_MAJOR}.0 or newer"
            )

    def used_bytes(self) -> int:
        """Memory of the GPU in use, by whomever."""
        context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
        # The context that onnxruntime shares, so that it is not counted as the artifact's.
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._call("cuCtxSetCurrent", context)
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return total.value - free.value

    def _call(self, name: str, *arguments: Any) -> None:
        result = getattr(self._driver, name)(*arguments)
        if result:
            raise ToolchainError(f"the NVIDIA driver fails ({name}: {result}): check nvidia-smi")
