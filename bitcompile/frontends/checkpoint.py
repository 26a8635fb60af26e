"""A Hugging Face checkpoint on disk: configuration, tensors one at a time, ternary form.

Nothing here is read ahead: a tensor is loaded when it is asked for, and a ternary weight goes from
the stored form to :class:`PackedTernary` without a float copy of it in between (online master
weights, which are float, one at a time).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitcompile.errors import InputError
from bitcompile.frontends.exact import RULE, exactly_ternary
from bitcompile.numerics import quantize_weight_absmean
from bitcompile.packing import PORTABLE, PackedTernary

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "generation_config.json",
)
"""Files beside the weights that a runtime for text needs; copied as they are."""
HUB_FILES = (CONFIG, INDEX, "*.safetensors", *TOKENIZER_FILES)
ROWS_PER_BYTE = 4
"""A packed Hugging Face weight holds four output rows, N/4 apart, in one byte."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises InputError if it is missing, broken or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.name} is missing: the checkpoint is not complete") from None
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path.name} cannot be read ({reason}): download it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path.name} holds no JSON object: download it again")
    return value


def resolve(source: str) -> tuple[Path, str]:
    """Directory and name of a checkpoint given as a directory or a hub id.

    The name is the hub id, or the directory's own name. Raises InputError if there is neither.
    """
    path = Path(source)
    if path.is_dir():
        return path, path.resolve().name
    if path.exists():
        raise InputError(f"{source!r} is a file: give the directory that holds {CONFIG}")
    return _download(source), source


def _download(repository: str) -> Path:
    """The hub's snapshot of a repository: the cached one if it is complete, else downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    files = list(HUB_FILES)
    try:
        cached = Path(snapshot_download(repository, local_files_only=True, allow_patterns=files))
        if _complete(cached):
            return cached
    except HFValidationError:
        raise InputError(
            f"{repository!r} is neither a directory nor a Hugging Face id (owner/name)"
        ) from None
    except (OSError, ValueError):
        pass  # not in the cache
    try:
        return Path(snapshot_download(repository, allow_patterns=files))
    except Exception as error:  # the hub client raises errors of its HTTP library too
        raise InputError(
            f"no directory {repository!r}, and it cannot be fetched from the Hugging Face hub "
            f"({type(error).__name__}): check the name and the network, or give a directory"
        ) from None


def _complete(path: Path) -> bool:
    if not (path / CONFIG).is_file():
        return False
    if (path / INDEX).is_file():
        return all((path / shard).is_file() for shard in set(_weight_map(path).values()))
    return (path / WEIGHTS).is_file()


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor name to shard file name of a sharded checkpoint."""
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{INDEX} has no weight_map: download it again")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise InputError(f"{INDEX} names a shard {shard!r} that is no plain file name")
    return weight_map


@dataclass
class Checkpoint:
    """Tensors and configuration of one checkpoint directory."""

    path: Path
    name: str
    """Hub id or directory name: what a manifest may tell."""
    config: dict[str, Any]
    _shards: dict[str, Any]
    """Tensor name to the open safetensors file that holds it."""
    _used: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, source: str) -> Checkpoint:
        """Open a directory or hub id; raises InputError if files are missing or damaged."""
        path, name = resolve(source)
        if not (path / CONFIG).is_file():
            raise InputError(
                f"{source!r} has no {CONFIG}: give a Hugging Face checkpoint directory"
            )
        return cls(path, name, read_json(path / CONFIG), {})

    def open_weights(self) -> None:
        """Open every shard and check that it is whole; raises InputError if one is not."""
        weight_map = _weight_map(self.path) if (self.path / INDEX).is_file() else None
        shards = sorted(set(weight_map.values())) if weight_map else [WEIGHTS]
        opened = {shard: _open_shard(self.path / shard) for shard in shards}
        self._shards = {name: file for file in opened.values() for name in file.keys()}  # noqa: SIM118 safetensors files are no mappings
        for name, shard in (weight_map or {}).items():
            if name not in self._shards:
                raise InputError(f"{shard} does not hold {name}, which {INDEX} says it does")

    def __contains__(self, name: str) -> bool:
        return name in self._shards

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._file(name).get_slice(name).get_shape())

    def is_float(self, name: str) -> bool:
        """Whether a tensor is of a float type, without reading it."""
        return str(self._file(name).get_slice(name).get_dtype()) in {"F32", "F16", "BF16"}

    def tensor(self, name: str, shape: tuple[int, ...]) -> Any:
        """One torch tensor as stored; raises InputError if it is missing or of another shape."""
        self._used.add(name)
        if self.shape(name) != shape:
            raise InputError(
                f"{name} is {list(self.shape(name))}, {CONFIG} makes it {list(shape)}: "
                "configuration and weights do not belong together"
            )
        return self._file(name).get_tensor(name)

    def floats(self, name: str, shape: tuple[int, ...]) -> Any:
        """One torch tensor of a float type as stored; raises InputError if it is another type."""
        if not self.is_float(name):
            raise InputError(f"{name} is not of a float type: this form is not supported")
        return self.tensor(name, shape)

    def unused(self) -> list[str]:
        """Names of the tensors that were never asked for."""
        return sorted(set(self._shards) - self._used)

    def tokenizer_files(self) -> tuple[Path, ...]:
        """The files that belong to text rather than to weights, by name.

        Raises InputError for one that ends in .json and cannot be read.
        """
        found = {file for pattern in TOKENIZER_FILES for file in self.path.glob(pattern)}
        files = tuple(sorted(file for file in found if file.is_file()))
        for file in files:
            if file.suffix == ".json":
                read_json(file)
        return files

    def _file(self, name: str) -> Any:
        if name not in self._shards:
            raise InputError(f"the checkpoint has no tensor {name}: it is not complete")
        return self._shards[name]


def _open_shard(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise InputError(f"{path.name} is missing: download the whole checkpoint") from None
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path.name} is damaged or not complete ({reason}): download it again"
        ) from None


@dataclass(frozen=True)
class WeightForm:
    """How a checkpoint stores its ternary weights (``quantization_config``)."""

    linear_class: str
    packed: bool
    """uint8 ``[N/4, K]`` and a ``weight_scale``; else float master weights ``[N, K]``."""
    inverse: bool
    """The result is divided by ``weight_scale`` instead of multiplied."""
    use_rms_norm: bool
    rms_norm_eps: float
    modules_to_not_convert: tuple[str, ...] | None
    exact: bool = False
    """Floats ``[N, K]`` that are ternary as they stand (:mod:`bitcompile.frontends.exact`)."""

    @classmethod
    def master(cls) -> WeightForm:
        """Float master weights, quantised here; no norm inside the layers."""
        return cls("autobitlinear", False, False, False, 0.0, None)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> WeightForm:
        """The form a configuration declares, of floats that are ternary as they stand if none.

        Raises InputError if it is unknown or ambiguous.
        """
        quantization = config.get("quantization_config")
        if quantization is None:
            return replace(cls.master(), exact=True)
        if not isinstance(quantization, dict):
            raise InputError(f"quantization_config is {quantization!r} in {CONFIG}: correct it")
        method = quantization.get("quant_method")
        if method != "bitnet":
            raise InputError(f"quant_method {method!r} is not supported; supported: 'bitnet'")
        linear_class = quantization.get("linear_class", "bitlinear")
        mode = quantization.get("quantization_mode", "offline")
        if linear_class not in ("bitlinear", "autobitlinear"):
            raise InputError(
                f"linear_class {linear_class!r} leaves the scale convention open; "
                "supported: 'bitlinear', 'autobitlinear'"
            )
        if mode not in ("offline", "online"):
            raise InputError(
                f"quantization_mode {mode!r} is not supported; supported: 'offline', 'online'"
            )
        if linear_class == "bitlinear" and mode == "online":
            raise InputError(
                "linear_class 'bitlinear' with quantization_mode 'online' is ambiguous: "
                "'bitlinear' weights are packed, 'online' ones are not; correct the configuration"
            )
        skipped = quantization.get("modules_to_not_convert")
        if skipped is not None and not _is_strings(skipped):
            raise InputError(f"modules_to_not_convert is no list of names: {skipped!r}")
        use_rms_norm = quantization.get("use_rms_norm", False)
        eps = quantization.get("rms_norm_eps", 1e-6)
        if not isinstance(use_rms_norm, bool) or not isinstance(eps, int | float):
            raise InputError(f"use_rms_norm {use_rms_norm!r}, rms_norm_eps {eps!r}: wrong types")
        return cls(
            linear_class=linear_class,
            packed=mode == "offline",
            inverse=linear_class == "bitlinear",
            use_rms_norm=use_rms_norm,
            rms_norm_eps=float(eps),
            modules_to_not_convert=None if skipped is None else tuple(skipped),
        )

    def read(self, checkpoint: Checkpoint, module: str, N: int, K: int) -> PackedTernary:
        """The weight of the linear layer ``module`` in the portable layout.

        Raises InputError if it is missing, not in this form, or not ternary.
        """
        weight, scale = f"{module}.weight", f"{module}.weight_scale"
        if self.exact and not checkpoint.is_float(weight):
            raise InputError(
                f"{weight} is packed and {CONFIG} has no quantization_config, which says how its "
                "scale is meant: complete the configuration"
            )
        if checkpoint.is_float(weight) == self.packed:
            stored, declared = ("packed", "float") if not self.packed else ("float", "packed")
            raise InputError(
                f"{weight} is {stored}, {CONFIG} declares {declared} weights "
                "(linear_class, quantization_mode): correct the configuration"
            )
        if self.packed:
            return self._read_packed(checkpoint, weight, scale, N, K)
        if scale in checkpoint:
            raise InputError(
                f"{scale} exists, but {CONFIG} declares float master weights, which have none: "
                "correct the configuration"
            )
        master = checkpoint.floats(weight, (N, K)).float().numpy()
        if not np.isfinite(master).all():
            raise InputError(f"{weight} holds NaN or Inf: the checkpoint is damaged")
        if not self.exact:
            return PackedTernary.pack(*quantize_weight_absmean(master))
        packed = exactly_ternary(master)
        if packed is None:
            raise InputError(
                f"{weight} is not ternary ({RULE}) and {CONFIG} has no quantization_config: only "
                "ternary checkpoints (quant_method 'bitnet', or such floats) can be compiled"
            )
        return packed

    def read_bias(self, checkpoint: Checkpoint, module: str, weight: PackedTernary) -> Any:
        """The bias of a layer as it is added last: a float32 torch tensor ``[N]``.

        A multiplying scale applies to the bias too: transformers multiplies after adding it.
        """
        import torch

        bias = checkpoint.floats(f"{module}.bias", weight.shape[:1]).float()
        if self.packed and not self.inverse:
            bias = bias * torch.from_numpy(weight.scale[:, 0])
        return bias

    def _read_packed(
        self, checkpoint: Checkpoint, weight: str, scale: str, N: int, K: int
    ) -> PackedTernary:
        if N % ROWS_PER_BYTE:
            raise InputError(
                f"{weight} has {N} rows: packed checkpoints hold multiples of {ROWS_PER_BYTE}"
            )
        codes = unpack_rows(checkpoint.tensor(weight, (N // ROWS_PER_BYTE, K)).numpy(), weight)
        stored = np.float32(checkpoint.floats(scale, (1,)).float().item())
        if not np.isfinite(stored) or stored <= 0:
            raise InputError(f"{scale} is {stored}, not a positive number: damaged checkpoint")
        w_scale = np.float32(1) / stored if self.inverse else stored
        rows = np.full((N, 1), w_scale, np.float32)
        return PackedTernary(PORTABLE.encode(codes), rows, PORTABLE, (N, K))


def unpack_rows(packed: npt.NDArray[np.uint8], name: str) -> npt.NDArray[np.uint8]:
    """Codes uint8 ``[N, K]`` of a Hugging Face packed weight uint8 ``[N/4, K]``.

    Bits ``2i..2i+1`` of row ``r`` hold output row ``r + i N/4``. Raises InputError naming the
    tensor if a code is 3.
    """
    if packed.dtype != np.uint8:
        raise InputError(f"{name} is {packed.dtype}, not uint8: this form is not supported")
    if (packed & (packed >> np.uint8(1)) & np.uint8(0x55)).any():
        raise InputError(f"{name} is not ternary: a packed code is 3")
    fields = [(packed >> np.uint8(2 * i)) & np.uint8(3) for i in range(ROWS_PER_BYTE)]
    return np.concatenate(fields)


def _is_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
