"""The memory that movable layers' weights live in: one range per layer, on pages of the pool."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelive_kv.memory import Arena, PagePool
from pipelive_kv.weights.source import TensorSpec, WeightsError, WeightSource, layer_offsets

__all__ = ["WeightArena", "WeightTensor"]


class WeightTensor:
    """One tensor in a `WeightArena`: DLPack for engines, bytes for whoever fills it.

    It is a view: it must not be used, and nothing made from it, after the layer was dropped.
    `data_bytes` is None where the memory is not the host's.
    """

    def __init__(
        self, spec: TensorSpec, memory: Any, data_bytes: npt.NDArray[np.uint8] | None
    ) -> None:
        self.spec = spec
        self.data_bytes = data_bytes
        self._memory = memory

    def __dlpack__(self, **options: Any) -> Any:
        return self._memory.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        device: tuple[int, int] = self._memory.__dlpack_device__()
        return device

    def __repr__(self) -> str:
        return f"WeightTensor({self.spec})"


class WeightArena:
    """Weights of any set of a model's layers, each mapped while it is held.

    Addresses are reserved for every layer, so a layer that comes back lands where it was. A
    layer's range starts on a page of its own: dropping it gives all its pages back. On a device
    other than the host, weights pass through a buffer in host memory on their way in and out.

    Args:
        page_pool: where pages come from; its budget bounds what can be held.
        layouts: a `WeightSource` to load from, or the layout of every layer.
        num_layers: layers of the model.

    Raises:
        WeightsError: if a layout is missing or malformed.
    """

    def __init__(
        self,
        page_pool: PagePool,
        layouts: WeightSource | Sequence[Sequence[TensorSpec]],
        num_layers: int,
    ) -> None:
        if num_layers < 1:
            raise WeightsError(f"num_layers is {num_layers}; expected at least 1")
        if isinstance(layouts, Sequence):
            if len(layouts) != num_layers:
                raise WeightsError(f"{len(layouts)} layouts given for {num_layers} layers")
            self._layouts = [tuple(layout) for layout in layouts]
        else:
            self._layouts = [tuple(layouts.layout(layer)) for layer in range(num_layers)]
        page = page_pool.page_bytes
        self._offsets: list[dict[str, int]] = []
        self._sizes: list[int] = []
        self._starts: list[int] = []
        end = 0
        for layout in self._layouts:
            offsets, size = layer_offsets(layout)
            self._offsets.append(offsets)
            self._sizes.append(size)
            self._starts.append(end)
            end += -(-size // page) * page
        self._ends = [*self._starts[1:], end]
        self._source = None if isinstance(layouts, Sequence) else layouts
        self._arena = Arena(page_pool, max(end, page))
        self._on_host = page_pool.device.name == "cpu"
        self._held: set[int] = set()
        self._landing: dict[int, npt.NDArray[np.uint8]] = {}
        self._lock = threading.Lock()

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self._layouts)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that are held (their pages are mapped), sorted."""
        with self._lock:
            return tuple(sorted(self._held))

    def layout(self, layer: int) -> tuple[TensorSpec, ...]:
        """Return the tensors of a layer, held or not."""
        return self._layouts[self._checked(layer)]

    def layer_bytes(self, layer: int) -> int:
        """Return the bytes of memory that a layer takes from the pool: whole pages."""
        layer = self._checked(layer)
        return self._ends[layer] - self._starts[layer]

    def region_bytes(self, layer: int) -> int:
        """Return the bytes of a layer's tensors with the gaps that align them."""
        return self._sizes[self._checked(layer)]

    def add(self, layer: int) -> None:
        """Map the pages of a layer; what they hold is undefined until it is loaded.

        Raises:
            WeightsError: if the layer is held already or out of range.
            OverBudgetError, OutOfMemoryError: if the pages cannot be had; nothing has changed.
        """
        layer = self._checked(layer)
        with self._lock:
            if layer in self._held:
                raise WeightsError(f"layer {layer} is already held")
            if self.layer_bytes(layer):
                self._arena.map(self._starts[layer], self.layer_bytes(layer))
            self._held.add(layer)

    def drop(self, layer: int) -> None:
        """Give the pages of a layer back to the pool; every view of it is dead from now on.

        Raises:
            WeightsError: if the layer is not held.
        """
        layer = self._checked(layer)
        with self._lock:
            self._require_held(layer)
            if self.layer_bytes(layer):
                self._arena.unmap(self._starts[layer], self.layer_bytes(layer))
            self._held.discard(layer)
            self._landing.pop(layer, None)

    def load(self, layer: int) -> None:
        """Fill a held layer from the source that the arena was made with.

        Different layers may be loaded by different threads at once.

        Raises:
            WeightsError: as `WeightSource.load`, or if there is no source; what the layer's memory
                holds is undefined then.
        """
        if self._source is None:
            raise WeightsError(f"layer {layer}: the arena was made without a source to load from")
        if self._on_host:
            self._source.load(layer, self.tensors(layer))
            return
        layer = self._checked(layer)
        staged = np.empty(self._sizes[layer], np.uint8)
        views = {
            spec.name: WeightTensor(spec, None, self._part(layer, spec, staged))
            for spec in self._layouts[layer]
        }
        self._source.load(layer, views)
        with self._lock:
            self._require_held(layer)
            self._arena.write(self._starts[layer], staged)

    def tensors(self, layer: int) -> dict[str, WeightTensor]:
        """Return views of a held layer's tensors, by name; nothing is copied."""
        layer = self._checked(layer)
        data = self._host_bytes(layer) if self._on_host else None
        start = self._starts[layer]
        views: dict[str, WeightTensor] = {}
        with self._lock:
            self._require_held(layer)
        for spec in self._layouts[layer]:
            offset = start + self._offsets[layer][spec.name]
            memory = self._arena.tensor(offset, spec.shape, spec.dtype)
            part = None if data is None else self._part(layer, spec, data)
            views[spec.name] = WeightTensor(spec, memory, part)
        return views

    def region(self, layer: int) -> npt.NDArray[np.uint8]:
        """Return where a held layer's bytes land as they travel between stages, writable.

        :meth:`landed` must follow before the layer's tensors are used.
        """
        layer = self._checked(layer)
        if self._on_host:
            return self._host_bytes(layer)
        with self._lock:
            self._require_held(layer)
            return self._landing.setdefault(layer, np.empty(self._sizes[layer], np.uint8))

    def landed(self, layer: int) -> None:
        """All bytes of :meth:`region` have come: put them into their place."""
        layer = self._checked(layer)
        with self._lock:
            self._require_held(layer)
            staged = self._landing.pop(layer, None)
            if staged is not None:
                self._arena.write(self._starts[layer], staged)

    def outgoing(self, layer: int) -> npt.NDArray[np.uint8]:
        """Return all bytes of a loaded layer in host memory, as they travel between stages."""
        layer = self._checked(layer)
        if self._on_host:
            return self._host_bytes(layer)
        copied = np.empty(self._sizes[layer], np.uint8)
        with self._lock:
            self._require_held(layer)
            self._arena.read(self._starts[layer], copied)
        return copied

    def _host_bytes(self, layer: int) -> npt.NDArray[np.uint8]:
        with self._lock:
            self._require_held(layer)
        size = self._sizes[layer]
        if size == 0:
            return np.empty(0, np.uint8)
        data: npt.NDArray[Any] = np.from_dlpack(
            self._arena.tensor(self._starts[layer], (size,), "uint8")
        )
        return data

    def _part(
        self, layer: int, spec: TensorSpec, data: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.uint8]:
        offset = self._offsets[layer][spec.name]
        return data[offset : offset + spec.nbytes]

    def close(self) -> None:
        """Give all pages and the addresses back; every view is dead from now on."""
        with self._lock:
            self._held.clear()
            self._arena.close()

    def _checked(self, layer: int) -> int:
        if not 0 <= layer < len(self._layouts):
            raise WeightsError(f"layer is {layer}; expected 0 to {len(self._layouts) - 1}")
        return layer

    def _require_held(self, layer: int) -> None:
        if layer not in self._held:
            raise WeightsError(f"layer {layer} is not held; held are {sorted(self._held)}")
