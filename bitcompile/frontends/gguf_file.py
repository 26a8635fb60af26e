"""A GGUF file on disk: metadata, and tensors one at a time.

Imported only when a GGUF file is converted. The ``gguf`` package reads the header; this module
bounds every read by the file, since a damaged count would keep the package busy for ever, and finds
tensors itself, since the package refuses the types of bitnet.cpp.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf.quants import dequantize

from bitcompile.errors import InputError
from bitcompile.frontends.gguf_ternary import BLOCKS, block_values

I2_S = 36
"""Type id of bitnet.cpp's I2_S (``GGML_TYPE_I2_S``); the package does not know it."""
Q2_0 = 42
"""Type id of llama.cpp's Q2_0, and of its fork's other Q2_0; the package (0.19) knows neither."""
ROTATED = {142: "PQ2_0", 143: "PTQ1_0"}
"""Type ids of that fork whose models may rotate activations first, which the type does not say."""
I2_S_SCALE = 4
"""Bytes of the float32 scale behind the codes of an I2_S tensor; its tail goes on as padding."""
LONGEST_ARRAY = 1 << 22
"""Elements of a metadata array; the largest vocabularies have 2**18 tokens, 2**19 merges."""
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies in the file."""

    name: str
    shape: tuple[int, ...]
    """Row-major: ``(N, K)`` of a matrix (GGUF stores the reverse)."""
    type: int
    begin: int
    nbytes: int
    columns: int = 0
    """Columns of a block of Q2_0."""

    @property
    def type_name(self) -> str:
        """The type as GGUF calls it; for Q2_0 with the columns of a block."""
        if self.type == I2_S:
            return "I2_S"
        if self.type == Q2_0:
            return f"Q2_0 g{self.columns}"
        return GGMLQuantizationType(self.type).name


class _Reader(GGUFReader):
    """The package's header reader, bounded by the file and without its table of tensors."""

    infos: list[tuple[str, list[int], int, int]]
    """Name, dimensions, type id and offset of each tensor."""

    def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("it ends before its header does")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        is_array = raw_type == GGUFValueType.ARRAY
        if is_array and int(self._get(orig_offs + 4, np.uint64)[0]) > LONGEST_ARRAY:
            raise ValueError(f"an array has more than {LONGEST_ARRAY} elements")
        return super()._get_field_parts(orig_offs, raw_type)

    def _build_tensors(self, start_offs: int, fields: Any) -> None:
        self.infos = []
        for field in fields:
            _, name, _, dims, kind, offset = field.parts
            begin = int(start_offs) + int(offset[0])
            text = bytes(name).decode()
            if not text.isprintable():
                raise ValueError("a tensor has a name that cannot be printed")
            self.infos.append((text, dims.tolist(), int(kind[0]), begin))


class GgufFile:
    """Metadata and tensors of one file; raises InputError if it is missing, damaged or not GGUF."""

    def __init__(self, path: str) -> None:
        self.name = os.path.basename(path)
        try:
            reader = _Reader(path)
            self.metadata: dict[str, Any] = {
                name: field.contents() for name, field in reader.fields.items()
            }
        except FileNotFoundError:
            raise InputError(f"no file {path!r}: check the name") from None
        except Exception as error:  # the package raises whatever its indexing meets
            reason = " ".join(str(error).split())[:120]
            raise InputError(
                f"{self.name} is damaged, not complete or no GGUF file ({reason}): "
                "download it again"
            ) from None
        if reader.byte_order != "I":
            raise InputError(f"{self.name} is big-endian: convert the model again")
        self._data: Bytes = reader.data
        self._alignment = int(reader.alignment)
        self.tensors = self._place(reader.infos)

    def _place(self, infos: list[tuple[str, list[int], int, int]]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        columns = self._q2_columns(infos)
        for name, dims, kind, begin in infos:
            if name in tensors:
                raise InputError(f"{self.name} holds {name} twice: convert the model again")
            shape = tuple(reversed(dims))
            if not 1 <= len(shape) <= 4 or min(shape) < 1:
                raise InputError(f"{name} has shape {list(shape)}: damaged file, download it again")
            if kind == Q2_0:
                nbytes = _blocks_nbytes(shape, columns)
                tensors[name] = Tensor(name, shape, kind, begin, nbytes, columns)
            else:
                tensors[name] = Tensor(name, shape, kind, begin, _nbytes(name, shape, kind))
        end = len(self._data)
        for tensor in sorted(tensors.values(), key=lambda t: t.begin, reverse=True):
            if tensor.begin + tensor.nbytes > end:
                raise InputError(
                    f"{tensor.name} runs past {'its end' if end == len(self._data) else 'the next'}"
                    f" in {self.name}: not complete or damaged, download it again"
                )
            end = tensor.begin
        return tensors

    def _q2_columns(self, infos: list[tuple[str, list[int], int, int]]) -> int:
        """Columns of a block of Q2_0 in this file, 0 if it has none.

        Two formats share the type id. Tensors follow each other, each padded to the file's
        alignment, so that the distance to the next one tells; raises InputError if it tells
        neither or both.
        """
        found = {64, 128} if any(kind == Q2_0 for _, _, kind, _ in infos) else {0}
        begins = [*sorted(begin for *_, begin in infos), len(self._data)]
        for _, dims, kind, begin in infos:
            if kind != Q2_0:
                continue
            span = next((b for b in begins if b > begin), begin) - begin
            shape = tuple(reversed(dims))
            found = {
                columns
                for columns in found
                if min(shape, default=0) > 0
                and shape[-1] % columns == 0
                and 0 <= span - _blocks_nbytes(shape, columns) < self._alignment
            }
        if len(found) != 1:
            raise InputError(
                f"the Q2_0 tensors of {self.name} are {'not all' if not found else 'too few to be'}"
                " told as blocks of 64 or of 128 columns: damaged, or convert the model to TQ2_0"
            )
        return found.pop()

    def raw(self, name: str) -> Bytes:
        """The bytes of a tensor, mapped."""
        tensor = self.tensors[name]
        return self._data[tensor.begin : tensor.begin + tensor.nbytes]

    def floats(self, name: str) -> npt.NDArray[Any]:
        """A tensor of a float or dequantised block type: float32, or float16 as stored."""
        tensor = self.tensors[name]
        if tensor.type == I2_S or tensor.type_name.startswith("I"):
            raise InputError(f"{name} is {tensor.type_name}, not of a float type: not supported")
        if tensor.type == GGMLQuantizationType.F16:
            return self.raw(name).view(np.float16).reshape(tensor.shape)
        if tensor.type == GGMLQuantizationType.F32:
            return self.raw(name).view(np.float32).reshape(tensor.shape)
        if tensor.type_name in BLOCKS:
            return block_values(name, tensor.type_name, self.raw(name), tensor.shape)
        try:
            rows = self.raw(name).reshape(math.prod(tensor.shape[:-1]), -1)
            values = dequantize(rows, GGMLQuantizationType(tensor.type))
        except NotImplementedError:
            raise InputError(
                f"{name} is {tensor.type_name}, which the gguf package does not dequantise: "
                "convert the model with another type"
            ) from None
        return np.asarray(values, np.float32).reshape(tensor.shape)


def _blocks_nbytes(shape: tuple[int, ...], columns: int) -> int:
    """Bytes of a tensor of Q2_0."""
    return math.prod(shape) // columns * BLOCKS[f"Q2_0 g{columns}"].nbytes


def _nbytes(name: str, shape: tuple[int, ...], kind: int) -> int:
    """Bytes that hold the values of a tensor; raises InputError for a type that is not known."""
    count = math.prod(shape)
    if kind == I2_S:
        if count % 4:
            raise InputError(f"{name} has {count} values, I2_S holds four a byte: damaged file")
        return count // 4 + I2_S_SCALE
    if kind in ROTATED:
        raise InputError(
            f"{name} is {ROTATED[kind]}, whose models may need rotated activations: use the "
            "model's Q2_0 file or its unpacked checkpoint"
        )
    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except ValueError:
        raise InputError(
            f"{name} is of type {kind}, which this version of the gguf package does not know: "
            "convert the model to I2_S, TQ1_0, TQ2_0 or Q2_0"
        ) from None
    if shape[-1] % block:
        raise InputError(f"{name} has {shape[-1]} columns, its type blocks of {block}: damaged")
    return int(count // block * size)
