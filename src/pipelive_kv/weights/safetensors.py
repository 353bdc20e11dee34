"""Weights from a safetensors checkpoint, one file or many, read straight into their place."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelive_kv.weights.host import writable_bytes
from pipelive_kv.weights.source import ITEM_BYTES, TensorSpec, WeightsError

__all__ = ["SafetensorsSource"]

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_CASTABLE = ("float64", "float32", "float16", "bfloat16")
_MAX_HEADER = 100_000_000  # the format's own limit
_CHUNK = 8 << 20


@dataclass(frozen=True)
class _Entry:
    """Where a tensor lies: a file, the byte it starts at, and what it is."""

    file: _File
    start: int
    spec: TensorSpec


class _File:
    """One safetensors file, open for reading, with its header checked against its size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = -1
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.entries = dict(self._read_header())
        except OSError as error:
            self.close()
            raise WeightsError(f"{path}: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> Iterable[tuple[str, _Entry]]:
        size = os.fstat(self.descriptor).st_size
        head = os.pread(self.descriptor, 8, 0)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(_MAX_HEADER, size - 8):
            raise WeightsError(
                f"{self.path}: {size} bytes; not a safetensors file, or cut off in its header"
            )
        try:
            header = json.loads(os.pread(self.descriptor, length, 8))
            if not isinstance(header, dict):
                raise TypeError("expected an object")
        except (ValueError, TypeError) as error:
            raise WeightsError(f"{self.path}: the header cannot be read: {error}") from error
        header.pop("__metadata__", None)
        base = 8 + length
        for name, value in header.items():
            try:
                dtype, shape = value["dtype"], tuple(int(extent) for extent in value["shape"])
                begin, end = (int(offset) for offset in value["data_offsets"])
            except (KeyError, TypeError, ValueError) as error:
                raise WeightsError(f"{self.path}: the entry of {name} is malformed") from error
            if dtype not in _DTYPES:
                raise WeightsError(f"{self.path}: {name} has the unknown dtype {dtype!r}")
            spec = TensorSpec(name, _DTYPES[dtype], shape)
            if begin < 0 or end - begin != spec.nbytes:
                raise WeightsError(
                    f"{self.path}: {spec} takes {spec.nbytes} bytes, "
                    f"the header gives it {end - begin}"
                )
            if base + end > size:
                raise WeightsError(
                    f"{self.path}: truncated: {name} ends at byte {base + end}, the file has {size}"
                )
            yield name, _Entry(self, base + begin, spec)

    def read(self, start: int, into: npt.NDArray[np.uint8], name: str) -> None:
        """Fill `into` with the bytes from `start` on; the GIL is released while reading.

        Reading, not mapping: a file that shrinks under a mapping kills the process with SIGBUS,
        a short read is an error like any other.
        """
        view = memoryview(into)  # type: ignore[arg-type]  # an array lends its buffer
        done = 0
        while done < len(view):
            if self.descriptor < 0:
                raise WeightsError(f"{self.path}: the source is closed")
            try:
                count = os.preadv(self.descriptor, [view[done : done + _CHUNK]], start + done)
            except OSError as error:
                raise WeightsError(f"{self.path}: {name}: {error.strerror}") from error
            if count == 0:
                raise WeightsError(
                    f"{self.path}: truncated while in use: {name} has {done} of {len(view)} bytes"
                )
            done += count

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class SafetensorsSource:
    """A `WeightSource` over a checkpoint folder (or one file) with Hugging Face names.

    Args:
        path: a folder with model.safetensors or model.safetensors.index.json, or one file.
        dtype: convert floating-point weights to this dtype while loading; None keeps the file's.
        prefix: what comes before a layer's index in the names: "model.layers.".

    Raises:
        WeightsError: if a file is missing, truncated or malformed, or layers are missing.
    """

    def __init__(
        self, path: Path | str, *, dtype: str | None = None, prefix: str = "model.layers."
    ) -> None:
        if dtype is not None and dtype not in _CASTABLE:
            raise WeightsError(f"dtype is {dtype!r}; expected one of {', '.join(_CASTABLE)}")
        self.path = Path(path)
        self.dtype = dtype
        self._files: list[_File] = []
        try:
            self._entries = self._open()
            self._layers = self._group(prefix)
        except BaseException:
            self.close()
            raise

    @property
    def num_layers(self) -> int:
        """Number of layers found; their indices run from 0."""
        return len(self._layers)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors in the checkpoint."""
        return tuple(self._entries)

    def spec(self, name: str) -> TensorSpec:
        """Return what the tensor of this name is once loaded (after conversion)."""
        entry = self._entries.get(name)
        if entry is None:
            raise WeightsError(f"{self.path}: there is no tensor {name}")
        return self._loaded(entry.spec, name)

    def layout(self, layer: int) -> tuple[TensorSpec, ...]:
        """Return the tensors of a layer, sorted by name; see `WeightSource`."""
        return tuple(self._loaded(e.spec, name) for name, e in self._layer(layer).items())

    def load(self, layer: int, into: Mapping[str, Any]) -> None:
        """Copy a layer's weights from the file; see `WeightSource`."""
        for name, entry in self._layer(layer).items():
            if name not in into:
                raise WeightsError(f"{self.path}: layer {layer}: no target given for {name}")
            self._load(entry, into[name])

    def load_tensor(self, name: str, into: Any) -> None:
        """Copy one tensor, by its full name in the checkpoint, into host memory."""
        self.spec(name)
        self._load(self._entries[name], into)

    def close(self) -> None:
        """Close the files; loading is an error from now on."""
        for file in self._files:
            file.close()

    def _layer(self, layer: int) -> dict[str, _Entry]:
        if not 0 <= layer < len(self._layers):
            raise WeightsError(
                f"{self.path}: layer is {layer}; expected 0 to {len(self._layers) - 1}"
            )
        return self._layers[layer]

    def _loaded(self, spec: TensorSpec, name: str) -> TensorSpec:
        cast = self.dtype is not None and spec.dtype in _CASTABLE
        return TensorSpec(name, self.dtype if cast and self.dtype else spec.dtype, spec.shape)

    def _open(self) -> dict[str, _Entry]:
        if not self.path.is_dir():
            return self._add(self.path)
        index = self.path / "model.safetensors.index.json"
        if not index.is_file():
            return self._add(self.path / "model.safetensors")
        try:
            shards: dict[str, str] = json.loads(index.read_text())["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"{index}: cannot be read: {error}") from error
        found: dict[str, _Entry] = {}
        for shard in sorted(set(shards.values())):
            if Path(shard).name != shard:
                raise WeightsError(f"{index}: {shard!r} is not the name of a file beside it")
            found.update(self._add(self.path / shard))
        for name, shard in shards.items():
            if name not in found:
                raise WeightsError(
                    f"{self.path / shard}: {name} is missing; the index puts it here"
                )
        return found

    def _add(self, path: Path) -> dict[str, _Entry]:
        file = _File(path)
        self._files.append(file)
        return file.entries

    def _group(self, prefix: str) -> list[dict[str, _Entry]]:
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.(.+)")
        layers: dict[int, dict[str, _Entry]] = {}
        for name in sorted(self._entries):
            match = pattern.fullmatch(name)
            if match:
                layers.setdefault(int(match[1]), {})[match[2]] = self._entries[name]
        missing = [i for i in range(max(layers, default=-1) + 1) if i not in layers]
        if missing:
            raise WeightsError(f"{self.path}: no tensors of layer {missing[0]}")
        return [layers[index] for index in sorted(layers)]

    def _load(self, entry: _Entry, target: Any) -> None:
        spec = self._loaded(entry.spec, entry.spec.name)
        into = writable_bytes(target, spec)
        if spec.dtype == entry.spec.dtype:
            entry.file.read(entry.start, into, spec.name)
        else:
            _load_converted(entry, spec, into)


def _load_converted(entry: _Entry, spec: TensorSpec, into: npt.NDArray[np.uint8]) -> None:
    """Read in chunks and convert each; torch does it, because NumPy has no bfloat16."""
    import torch  # noqa: PLC0415

    source, target = getattr(torch, entry.spec.dtype), getattr(torch, spec.dtype)
    result = torch.from_numpy(into).view(target)
    item = ITEM_BYTES[entry.spec.dtype]
    step = _CHUNK // item
    buffer = np.empty(min(step, result.numel()) * item, np.uint8)
    for first in range(0, result.numel(), step):
        count = min(step, result.numel() - first)
        piece = buffer[: count * item]
        entry.file.read(entry.start + first * item, piece, spec.name)
        result[first : first + count].copy_(torch.from_numpy(piece).view(source))
