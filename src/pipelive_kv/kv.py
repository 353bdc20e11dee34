"""KV pools: the blocks of the layers that a stage holds, at addresses that never change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Protocol

from pipelive_kv import _core, cuda_arrays
from pipelive_kv.errors import BusyError, ClosedError, InvalidArgumentError
from pipelive_kv.memory import PagePool, whole
from pipelive_kv.spec import KVSpec

__all__ = ["AdoptedPool", "KVPool", "LayerView", "PoolStats", "blocks_that_fit", "bytes_needed"]

LayerView = _core.LayerView

Holes = Literal["fault", "scratch"]


class SupportsDLPack(Protocol):
    """Anything that lends its memory by DLPack."""

    def __dlpack__(self, **kwargs: Any) -> Any: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


@dataclass(frozen=True)
class PoolStats:
    """A pool's memory at one moment; sizes in bytes.

    ``used_bytes`` is what the live blocks take in the layers held, ``held_bytes`` the physical
    pages behind the pool, ``utilisation`` the one over the other (0 where nothing is held).
    """

    capacity: int
    max_blocks: int
    resident_blocks: int
    live_blocks: int
    layers_held: int
    held_bytes: int
    resident_bytes: int
    used_bytes: int
    utilisation: float


def _layer_list(layers: Iterable[int], name: str = "layers") -> list[int]:
    try:
        items = list(layers)
    except TypeError:
        raise InvalidArgumentError(f"{name} is {layers!r}, expected layer numbers") from None
    return [whole(layer, name, 0, (1 << 32) - 1) for layer in items]


def _layers_or_count(layers: Iterable[int] | int, num_layers: int) -> list[int]:
    """A plain number stands for that many layers from layer 0."""
    if isinstance(layers, int):
        return list(range(whole(layers, "layers", 0, num_layers)))
    return _layer_list(layers)


def _move_list(moves: Mapping[int, int]) -> list[tuple[int, int]]:
    return [(whole(old, "moves"), whole(new, "moves")) for old, new in moves.items()]


def _geometry(
    spec: KVSpec, num_layers: int, stack: int, max_blocks: int, page_bytes: int, holes: Holes
) -> _core.Geometry:
    return _core.Geometry(
        spec.core,
        whole(num_layers, "num_layers", 1, (1 << 32) - 1),
        whole(stack, "stack", 1, (1 << 32) - 1),
        whole(max_blocks, "max_blocks", 1),
        whole(page_bytes, "page_bytes", 1),
        holes,
    )


def bytes_needed(
    spec: KVSpec,
    layers: Iterable[int] | int,
    capacity: int,
    *,
    num_layers: int,
    stack: int = 1,
    page_bytes: int = 2 << 20,
    holes: Holes = "fault",
) -> int:
    """Bytes of pages that a pool of ``capacity`` blocks of those layers holds.

    Stacks that are only partly named count whole. No pool is needed for the question.
    """
    capacity = whole(capacity, "capacity")
    geometry = _geometry(spec, num_layers, stack, max(capacity, 1), page_bytes, holes)
    return geometry.bytes_needed(_layers_or_count(layers, num_layers), capacity)


def blocks_that_fit(
    spec: KVSpec,
    layers: Iterable[int] | int,
    budget_bytes: int,
    *,
    num_layers: int,
    max_blocks: int,
    stack: int = 1,
    page_bytes: int = 2 << 20,
    holes: Holes = "fault",
) -> int:
    """The largest capacity, up to ``max_blocks``, whose :func:`bytes_needed` is within the budget.

    0 where not even one block fits.
    """
    geometry = _geometry(spec, num_layers, stack, max_blocks, page_bytes, holes)
    budget = whole(budget_bytes, "budget_bytes")
    return geometry.blocks_that_fit(_layers_or_count(layers, num_layers), budget)


class KVPool:
    """The KV blocks of the layers that a stage holds. Thread-safe.

    Addresses are reserved for all ``num_layers`` layers of the model and ``max_blocks`` block ids;
    they never change. Resident (with memory behind them) are the ids ``[0, capacity)`` of the
    layers held. A block that becomes resident holds zeros. Every operation either does all that it
    was asked, or raises and leaves live blocks, capacity, layers and pages as they were.

    ``stack`` neighbouring layers lie side by side and are held or dropped together. ``holes`` says
    what stands behind ids that are not resident: ``"fault"`` nothing, so that a stray access is a
    segmentation fault; ``"scratch"`` one shared page. That page is taken away and memory put in its
    place (or the other way round) in two steps. So on a GPU every change of capacity or layers then
    waits for the streams of :meth:`use_stream`, and while it runs nothing may be launched that may
    touch ids which are not resident before it or after. There it costs time, too: the driver maps
    the page anew for every ``page_bytes`` of addresses without memory, when the pool is made and
    whenever memory is taken away; with a terabyte reserved in pages of 2 MiB that is half a million
    calls, some seconds. Reserve no more ``max_blocks`` than may be needed, or take larger pages.

    Pages come from ``page_pool`` or, without one, from a new pool on ``device`` with ``budget``
    bytes (default: room for every layer at ``max_blocks``) in pages of ``page_bytes``.
    """

    def __init__(
        self,
        spec: KVSpec,
        *,
        num_layers: int,
        max_blocks: int,
        layers: Iterable[int] = (),
        capacity: int = 1,
        budget: int | str | None = None,
        page_pool: PagePool | None = None,
        device: str | _core.Device = "cpu",
        stack: int = 1,
        page_bytes: int = 2 << 20,
        holes: Holes = "fault",
    ) -> None:
        if page_pool is not None:
            if budget is not None:
                raise InvalidArgumentError("budget and page_pool exclude each other")
            page_bytes = page_pool.page_bytes
        self._geometry = _geometry(spec, num_layers, stack, max_blocks, page_bytes, holes)
        self._num_layers = int(num_layers)
        self._max_blocks = int(max_blocks)
        self._stack = int(stack)
        self._spec = spec
        self._owns_pages = page_pool is None
        if page_pool is None:
            if budget is None:
                budget = self._geometry.bytes_needed(list(range(self._num_layers)), max_blocks)
            page_pool = PagePool(budget, page_bytes=page_bytes, device=device)
        self._pages = page_pool
        self._core = _core.KVPool(
            spec.core,
            page_pool.core,
            self._num_layers,
            _layer_list(layers),
            self._max_blocks,
            whole(capacity, "capacity"),
            self._stack,
            holes,
        )
        self._views: dict[int, LayerView] = {}
        self._streams: list[Any] = []  # kept alive for the core, which has their handles

    @classmethod
    def adopt(
        cls, spec: KVSpec, tensors: Mapping[int, SupportsDLPack], *, num_layers: int | None = None
    ) -> AdoptedPool:
        """A pool over KV tensors that an engine allocated itself; see :class:`AdoptedPool`."""
        return AdoptedPool(spec, tensors, num_layers=num_layers)

    @property
    def core(self) -> _core.KVPool:
        """The pool as the compiled core takes it."""
        return self._core

    @property
    def spec(self) -> KVSpec:
        """The shape of every layer's state."""
        return self._spec

    @property
    def num_layers(self) -> int:
        """Layers of the whole model."""
        return self._num_layers

    @property
    def max_blocks(self) -> int:
        """Block ids that addresses are reserved for."""
        return self._max_blocks

    @property
    def stack(self) -> int:
        """Layers whose blocks of one id lie side by side."""
        return self._stack

    @property
    def page_pool(self) -> PagePool:
        """Where the pages come from."""
        return self._pages

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers held, ascending."""
        return tuple(self._core.layers)

    @property
    def capacity(self) -> int:
        """The ids ``[0, capacity)`` are resident."""
        return self._core.capacity

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._core.closed

    def layer(self, layer: int) -> LayerView:
        """The blocks of any layer of the model, held or not; always the same view.

        What takes it by DLPack (``torch.from_dlpack``) has its current stream ordered behind those
        of :meth:`use_stream`. Take it before a CUDA graph is captured: inside of a capture that is
        refused with BusyError.
        """
        number = whole(layer, "layer", 0, self._num_layers - 1)
        if self._core.closed:
            raise ClosedError("the KV pool is closed")
        view = self._views.get(number)
        if view is None:
            view = self._views.setdefault(number, self._core.layer(number))
        return view

    def add_layers(self, layers: Iterable[int]) -> None:
        """Hold further layers, in whole stacks; their blocks ``[0, capacity)`` appear as zeros.

        Raises OverBudgetError where the pages do not fit, InvalidArgumentError for layers held
        already or stacks that are not whole.
        """
        self._core.add_layers(_layer_list(layers))

    def drop_layers(self, layers: Iterable[int]) -> None:
        """Give layers up, in whole stacks; their pages go back to the page pool."""
        self._core.drop_layers(_layer_list(layers))

    def grow(self, capacity: int) -> None:
        """Make the ids up to ``capacity`` resident in all layers held.

        With ``holes="scratch"`` on a GPU it waits for streams like :meth:`shrink`, and raises
        BusyError where one is being captured.
        """
        self._core.grow(whole(capacity, "capacity"))

    def shrink(
        self,
        capacity: int,
        *,
        live: Iterable[int] = (),
        moves: Mapping[int, int] | None = None,
        stream: Any = None,
        reclaim: bool = True,
    ) -> None:
        """Copy the blocks of ``moves`` ({old: new}) and keep only the ids below ``capacity``.

        Without ``reclaim`` the pages behind the other ids stay until :meth:`reclaim` takes them
        away, so that a step waits for no more than has to come before it.

        ``live`` are the ids whose bytes matter. On a GPU the copies go to ``stream``, if one is
        given, behind what :meth:`use_stream` streams have to do; and pages are taken away only when
        all of that is done. Raises BusyError naming live ids that neither fit nor are moved or
        because a stream is being captured, InvalidArgumentError for a move that is not from a live
        id to a free one below the new capacity, DeadlineError where a stream does not get done.
        """
        shrink = self._core.shrink if reclaim else self._core.lower
        shrink(
            whole(capacity, "capacity"),
            [whole(block, "live") for block in live],
            _move_list(moves or {}),
            stream,
        )

    def reclaim(self) -> None:
        """Take the pages away that :meth:`shrink` has left behind; without any, do nothing.

        Steps may go on meanwhile. It waits for what uses the pages as :meth:`shrink` does, and
        raises the same; it may be called again then. :meth:`grow` and :meth:`add_layers` do it
        first.
        """
        self._core.reclaim()

    def move_blocks(self, moves: Mapping[int, int], *, stream: Any = None) -> None:
        """Copy blocks ({old: new}) in all layers held; no id may take part in two moves.

        On a GPU with a ``stream`` the copies are part of its work; without one they are over when
        the call returns. Raises BusyError where that stream, or one of :meth:`use_stream`, is being
        captured into a CUDA graph, which would repeat the copies.
        """
        self._core.move_blocks(_move_list(moves), stream)

    def use_stream(self, stream: Any) -> None:
        """Announce a CUDA stream whose work reads or writes blocks, before it is given any.

        Memory is taken away (``shrink``, ``drop_layers``, ``close``) only when everything is done
        that the announced streams had been given by then; the default stream is announced already.
        Once per stream is enough and costs the steps nothing. ``stream`` is a stream of torch or
        cupy, which the pool then keeps alive, or a handle, which must stay valid until
        :meth:`release_stream`. On the CPU this means nothing.
        """
        self._core.note_stream(stream)
        if not isinstance(stream, int):
            self._streams.append(stream)

    def release_stream(self, stream: Any) -> None:
        """Take an announcement back: no work in the stream touches blocks any more."""
        self._core.forget_stream(stream)
        self._streams = [kept for kept in self._streams if kept is not stream and kept != stream]

    def is_resident(self, block: int) -> bool:
        """Whether the block id has memory behind it in the layers held."""
        number = whole(block, "block", -(1 << 62))
        return number >= 0 and self._core.is_resident(number)

    def bytes_needed(self, layers: Iterable[int] | int, capacity: int) -> int:
        """Bytes of pages for ``capacity`` blocks of those layers (a number: that many layers).

        Rounded up to whole stacks and pages; what this pool would hold with them.
        """
        return self._geometry.bytes_needed(
            _layers_or_count(layers, self._num_layers), whole(capacity, "capacity")
        )

    def blocks_that_fit(self, layers: Iterable[int] | int, budget_bytes: int) -> int:
        """The largest capacity for those layers within the budget; 0 where none fits."""
        return self._geometry.blocks_that_fit(
            _layers_or_count(layers, self._num_layers), whole(budget_bytes, "budget_bytes")
        )

    def stats(self, live: int | None = None) -> PoolStats:
        """Sizes at this moment; ``live`` is the number of live blocks (default: all resident)."""
        core = self._core.stats()
        blocks = core.capacity if live is None else whole(live, "live", 0, core.capacity)
        used = blocks * core.layers_held * self._spec.block_bytes
        return PoolStats(
            capacity=core.capacity,
            max_blocks=core.max_blocks,
            resident_blocks=core.capacity if core.layers_held else 0,
            live_blocks=blocks,
            layers_held=core.layers_held,
            held_bytes=core.held_bytes,
            resident_bytes=core.resident_bytes,
            used_bytes=used,
            utilisation=used / core.held_bytes if core.held_bytes else 0.0,
        )

    def close(self) -> None:
        """Return all pages. Views must not be touched any more; their addresses stay reserved."""
        self._views.clear()
        self._core.close()
        self._streams.clear()
        if self._owns_pages:
            self._pages.close()

    def __enter__(self) -> KVPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class AdoptedPool:
    """KV tensors that an engine allocated itself, one per layer, as a pool that cannot be resized.

    Each tensor is ``[blocks, kv_heads, 2, block_size, head_dim]`` in any strides with a contiguous
    last axis (permute an engine's own order of axes into this one), of the spec's dtype. They are
    used in place and kept alive. Raises InvalidArgumentError naming the layer that does not fit.
    """

    def __init__(
        self, spec: KVSpec, tensors: Mapping[int, SupportsDLPack], *, num_layers: int | None = None
    ) -> None:
        layers = {whole(layer, "tensors", 0, 65535): tensor for layer, tensor in tensors.items()}
        if num_layers is None:
            num_layers = max(layers, default=0) + 1
        self._spec = spec
        self._num_layers = whole(num_layers, "num_layers", 1, 65536)
        # torch lends tensors of its current GPU alone, and would only say that it does not lend.
        devices: dict[tuple[int, int], int] = {}
        for layer, tensor in layers.items():
            if cuda_arrays.on_gpu(tensor):
                kind, index = tensor.__dlpack_device__()
                devices.setdefault((int(kind), int(index)), layer)
        if len(devices) > 1:
            places = ", ".join(f"tensors[{n}] on GPU {index}" for (_, index), n in devices.items())
            raise InvalidArgumentError(f"tensors lie on several devices, expected one: {places}")
        with cuda_arrays.device_of(next(iter(layers.values()), None)):
            self._core = _core.AdoptedPool(spec.core, self._num_layers, layers)

    @property
    def spec(self) -> KVSpec:
        """The shape of every layer's state."""
        return self._spec

    @property
    def num_layers(self) -> int:
        """Layers of the whole model."""
        return self._num_layers

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers adopted, ascending."""
        return tuple(self._core.layers)

    @property
    def capacity(self) -> int:
        """Blocks of every tensor; all are resident."""
        return self._core.num_blocks

    @property
    def max_blocks(self) -> int:
        """The same as the capacity."""
        return self._core.num_blocks

    def layer(self, layer: int) -> LayerView:
        """The blocks of an adopted layer."""
        return self._core.layer(whole(layer, "layer", 0, (1 << 32) - 1))

    def is_resident(self, block: int) -> bool:
        """Whether the block id exists."""
        return 0 <= whole(block, "block", -(1 << 62)) < self._core.num_blocks

    def grow(self, capacity: int) -> None:
        """Refused with BusyError, unless the capacity stays: the engine owns the memory."""
        self._refuse_resize(capacity)

    def use_stream(self, stream: Any) -> None:
        """Nothing to do: the engine's memory is never taken away here."""

    def release_stream(self, stream: Any) -> None:
        """Nothing to do, as for :meth:`use_stream`."""

    def shrink(
        self,
        capacity: int,
        *,
        live: Iterable[int] = (),
        moves: Mapping[int, int] | None = None,
        stream: Any = None,
        reclaim: bool = True,
    ) -> None:
        """Refused with BusyError, unless the capacity stays and nothing moves."""
        if moves:
            raise BusyError("an adopted pool cannot move blocks: the engine owns the memory")
        self._refuse_resize(capacity)

    def reclaim(self) -> None:
        """Nothing: no pages are left behind."""

    def add_layers(self, layers: Iterable[int]) -> None:
        """Refused with BusyError: the engine owns the memory."""
        raise BusyError("an adopted pool cannot gain layers: the engine owns the memory")

    def drop_layers(self, layers: Iterable[int]) -> None:
        """Refused with BusyError: the engine owns the memory."""
        raise BusyError("an adopted pool cannot drop layers: the engine owns the memory")

    def _refuse_resize(self, capacity: int) -> None:
        if whole(capacity, "capacity", 1) != self.capacity:
            raise BusyError(
                f"an adopted pool cannot be resized from {self.capacity} to {capacity} blocks: "
                "the engine owns the memory"
            )

    def close(self) -> None:
        """Let go of the tensors; views refuse from now on."""
        self._core.close()
