"""Builds, loads and swaps the layers of a vLLM model; the engine's part of a move."""

from __future__ import annotations

import copy
import ctypes
import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelive_kv.errors import InvalidArgumentError
from pipelive_kv.placement import Placement
from pipelive_kv.stage import EngineHooks, LayerWeights
from pipelive_kv.weights import SafetensorsSource, TensorSpec, WeightsError

_SHORT_TURN_S = 0.0003


@dataclass(frozen=True)
class LayerFactory:
    """How the model builds a layer: what it gave to vLLM's ``make_layers``."""

    num_layers: int
    layer_fn: Callable[..., Any]
    prefix: str

    def name(self, layer: int) -> str:
        """The layer's name in the model, such as ``model.layers.3``."""
        return f"{self.prefix}.{layer}"


class VllmLayers(EngineHooks):
    """The layers of one worker: those that run, and those that are made ready beside them.

    Also the stage's :class:`LayerWeights`: vLLM packs weights as it likes, so they lie in memory of
    its own and not in the page pool, but they count in the budget.
    """

    in_pool = False

    def __init__(self, runner: Any, kv_view: Callable[[int], Any]) -> None:
        self._runner = runner
        self._model = runner.model
        self._config = runner.vllm_config
        self._kv_view = kv_view
        self._inner, self._modules = _find_layers(self._model)
        self.factory: LayerFactory = self._modules.pipelive
        self._names = attention_names(self._config.compilation_config)
        first = next(iter(self._names), None)
        if first is None:
            raise InvalidArgumentError("pipelive_kv: this rank has no layers at start")
        self._template = self._modules[first]
        self._suffix = self._names[first].removeprefix(self.factory.name(first))
        for layer, name in self._names.items():
            if name != self._attention_name(layer):
                raise InvalidArgumentError(
                    f"pipelive_kv: the attention of layer {layer} is {name}, expected "
                    f"{self._attention_name(layer)}"
                )
        self._source = SafetensorsSource(
            checkpoint_path(runner.model_config, self._config.load_config),
            prefix=f"{self.factory.prefix}.",
        )
        if self._source.num_layers != self.factory.num_layers:
            raise InvalidArgumentError(
                f"pipelive_kv: the checkpoint has {self._source.num_layers} layers named "
                f"{self.factory.prefix}.N, the model {self.factory.num_layers}"
            )
        self._bytes = tuple(
            served_bytes(self._source.layout(layer), runner.model_config.dtype)
            for layer in range(self.factory.num_layers)
        )
        self._built: dict[int, Any] = {}
        self._lost: dict[int, Any] = {}
        self._held = set(self._names)
        self._building = threading.Lock()
        for layer in self._names:
            self._check_alike(layer, self._modules[layer])  # now, and not at the first move

    # -- LayerWeights -----------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose weights are held, ascending."""
        return tuple(sorted(self._held))

    def layer_bytes(self, layer: int) -> int:
        """Bytes of the layer's weights in the model's dtype; vLLM's packed form is as large."""
        return self._bytes[layer]

    def add(self, layer: int) -> None:
        """Count the layer's weights in; memory is taken while they load."""
        self._held.add(layer)

    def load(self, layer: int) -> None:
        """Build the layer, load it from the checkpoint and post-process it as vLLM does."""
        with self._building, _short_turns(), _stream_of_its_own(self._runner.device):
            self._built[layer] = self._build(layer)

    def region(self, layer: int) -> Any:
        """Refused: packed weights are not bytes that another stage could use."""
        raise InvalidArgumentError(
            "weights_from is 'peer', expected 'source': vLLM's packed weights cannot be sent"
        )

    def landed(self, layer: int) -> None:
        """As :meth:`region`."""
        self.region(layer)

    def outgoing(self, layer: int) -> Any:
        """As :meth:`region`."""
        return self.region(layer)

    def drop(self, layer: int) -> None:
        """Count the layer's weights out; :meth:`retire` or :meth:`discard` gave them back."""
        self._held.discard(layer)
        self._forget([layer])

    # -- EngineHooks ------------------------------------------------------------------------------

    def prepare(self, layers: Sequence[int], arena: LayerWeights | None) -> None:
        """Tie the gained layers to their KV."""
        builder = self._runner.attn_groups[0][0].get_metadata_builder()
        for layer in layers:
            attention = self._attention(layer)
            attention.bind_kv_cache(self._kv_view(layer))
            if hasattr(builder, "isa"):
                attention.isa = builder.isa

    def activate(self, placement: Placement) -> None:
        """Swap modules and names; what was lost stays until :meth:`retire`."""
        from vllm.model_executor.models.utils import PPMissingLayer  # noqa: PLC0415

        layers = placement.layers_of(self._rank())
        gained = [layer for layer in layers if layer not in self._names]
        for layer in [layer for layer in self._names if layer not in layers]:
            self._lost[layer] = self._modules[layer]
            self._modules[layer] = PPMissingLayer()
            del self._names[layer]
        for layer in gained:
            # Under a lease, what was lost can come back as it is.
            ready = self._built if layer in self._built else self._lost
            self._modules[layer] = ready.pop(layer)
            self._names[layer] = self._attention_name(layer)
        self._inner.start_layer, self._inner.end_layer = layers[0], layers[-1] + 1
        names = [self._names[layer] for layer in layers]
        # Two lists of names: one that slot mappings go by, one that attention metadata goes by
        # (shared with the metadata builder).
        self._runner.kv_cache_config.kv_cache_groups[0].layer_names[:] = names
        self._runner.attn_groups[0][0].layer_names[:] = names
        self._runner.kv_caches[:] = [self._kv_view(layer) for layer in layers]
        self._template = self._modules[layers[0]]
        _forget_missing_names(self._model, self._inner)

    def discard(self, layers: Sequence[int]) -> None:
        """Forget what was built."""
        self._forget(layers)

    def retire(self, layers: Sequence[int]) -> None:
        """Forget what another rank runs now, and give its memory back to the system."""
        self._forget(layers)

    def _forget(self, layers: Sequence[int]) -> None:
        context = self._config.compilation_config.static_forward_context
        found = False
        for layer in layers:
            for store in (self._built, self._lost):
                module = store.pop(layer, None)
                if module is not None:
                    found = True
                    _dissolve(module, [self._modules, *self._built.values(), *self._lost.values()])
                    del module
            if layer not in self._names:
                context.pop(self._attention_name(layer), None)
        if found:
            _trim_heap()
            if self._runner.device.type == "cuda":
                import torch  # noqa: PLC0415

                # torch would keep the memory for tensors to come, and KV blocks are not torch's:
                # they find only what the driver has. It also waits for the device, and so for
                # steps that still read the layer, which was made in another stream than theirs.
                torch.cuda.empty_cache()

    # -- how --------------------------------------------------------------------------------------

    def _rank(self) -> int:
        from vllm.distributed.parallel_state import get_pp_group  # noqa: PLC0415

        rank: int = get_pp_group().rank_in_group
        return rank

    @property
    def attention_names(self) -> dict[int, str]:
        """The attention's name in vLLM of each layer that runs here."""
        return dict(self._names)

    def _attention_name(self, layer: int) -> str:
        return self.factory.name(layer) + self._suffix

    def _attention(self, layer: int) -> Any:
        context = self._config.compilation_config.static_forward_context
        return context[self._attention_name(layer)]

    def _build(self, layer: int) -> Any:
        import torch  # noqa: PLC0415
        from vllm.config import set_current_vllm_config  # noqa: PLC0415
        from vllm.model_executor.model_loader.utils import (  # noqa: PLC0415
            process_weights_after_loading,
        )

        self._config.compilation_config.static_forward_context.pop(
            self._attention_name(layer), None
        )
        device, on_gpu = self._runner.device, self._runner.device.type == "cuda"
        with (
            set_current_vllm_config(self._config),
            default_dtype(self._runner.model_config.dtype),
            torch.device(device) if on_gpu else nullcontext(),
        ):
            module = self.factory.layer_fn(prefix=self.factory.name(layer))
        wanted = {f"{self.factory.name(layer)}.{name}" for name, _ in module.named_parameters()}
        missing = wanted - self._load_into(layer, module)
        if missing:
            raise WeightsError(f"layer {layer}: the checkpoint lacks {', '.join(sorted(missing))}")
        with set_current_vllm_config(self._config), torch.no_grad():
            holder = torch.nn.Module()
            holder.layer = module
            process_weights_after_loading(holder, self._runner.model_config, torch.device(device))
        module.eval()
        self._check_alike(layer, module)
        return module

    def _load_into(self, layer: int, module: Any) -> set[str]:
        """Load one layer through the model's own ``load_weights``, beside the model that serves."""
        import torch  # noqa: PLC0415

        shadow, inner = _shadow(self._model, self._inner, self._modules, layer, module)
        tensors = {
            spec.name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="cpu")
            for spec in self._source.layout(layer)
        }
        self._source.load(layer, tensors)
        try:
            loaded = shadow.load_weights(
                (f"{self.factory.name(layer)}.{name}", tensor) for name, tensor in tensors.items()
            )
        finally:
            _forget_missing_names(shadow, inner)
        return set(loaded or ())

    def _check_alike(self, layer: int, module: Any) -> None:
        """A layer built later must be what vLLM builds at start."""
        want = {n: (t.dtype, t.shape) for n, t in _tensors(self._template)}
        have = {n: (t.dtype, t.shape) for n, t in _tensors(module)}
        if want != have:
            names = sorted(n for n in want.keys() | have.keys() if want.get(n) != have.get(n))
            raise WeightsError(
                f"layer {layer} was built unlike its neighbours: {', '.join(names[:4])} is "
                f"{have.get(names[0])}, expected {want.get(names[0])}"
            )


def _tensors(module: Any) -> Iterator[tuple[str, Any]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _find_layers(model: Any) -> tuple[Any, Any]:
    """The module that has ``start_layer`` and ``end_layer``, and its list of layers."""
    found = [
        (module, child)
        for module in model.modules()
        for child in module.children()
        if hasattr(child, "pipelive")
    ]
    if len(found) != 1 or not hasattr(found[0][0], "start_layer"):
        raise InvalidArgumentError(
            f"pipelive_kv: {type(model).__name__} has {len(found)} lists of layers made by "
            "make_layers, expected one in a module with start_layer and end_layer"
        )
    return found[0]


def attention_names(compilation_config: Any) -> dict[int, str]:
    """The name of each layer's attention, by layer.

    Raises:
        InvalidArgumentError: a layer has another part that vLLM knows by name: a mixture of
            experts, or a second attention.
    """
    from vllm.model_executor.models.utils import extract_layer_index  # noqa: PLC0415

    if compilation_config.static_all_moe_layers:
        raise InvalidArgumentError(
            "pipelive_kv: the model is a mixture of experts "
            f"({compilation_config.static_all_moe_layers[0]}), which has never been tried"
        )
    names: dict[int, str] = {}
    for name in compilation_config.static_forward_context:
        layer = extract_layer_index(name)
        if layer in names:
            raise InvalidArgumentError(
                f"pipelive_kv: layer {layer} has the attentions {names[layer]} and {name}, "
                "expected one"
            )
        names[layer] = name
    return dict(sorted(names.items()))


def checkpoint_path(model_config: Any, load_config: Any) -> Path:
    """The folder that vLLM has loaded the model from: the same snapshot in the same cache."""
    from vllm.model_executor.model_loader.weight_utils import (  # noqa: PLC0415
        maybe_download_from_modelscope,
    )

    name, revision = model_config.model, model_config.revision
    path = Path(maybe_download_from_modelscope(name, revision) or name)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    return Path(
        snapshot_download(
            name, revision=revision, cache_dir=load_config.download_dir, local_files_only=True
        )
    )


def served_bytes(layout: Iterable[TensorSpec], dtype: Any) -> int:
    """Bytes of a layer's tensors once they are loaded: floating point ones in the model's dtype."""
    return sum(
        math.prod(spec.shape) * dtype.itemsize if "float" in spec.dtype else spec.nbytes
        for spec in layout
    )


def _shadow(model: Any, inner: Any, modules: Any, layer: int, module: Any) -> tuple[Any, Any]:
    """A copy of the modules on the way to the layers, with only ``layer`` in its list."""
    import torch  # noqa: PLC0415
    from vllm.model_executor.models.utils import PPMissingLayer  # noqa: PLC0415

    only = torch.nn.ModuleList(
        module if index == layer else PPMissingLayer() for index in range(len(modules))
    )

    def copied(parent: Any) -> Any:
        if parent is modules:
            return only
        children = {name: copied(child) for name, child in parent._modules.items()}
        if all(children[name] is child for name, child in parent._modules.items()):
            return parent
        twin = copy.copy(parent)
        twin._modules = children
        return twin

    shadow = copied(model)
    return shadow, next(m for m in shadow.modules() if only in m.children())


def _dissolve(module: Any, others: Sequence[Any]) -> None:
    """Let a module's memory go now, and not when cycles are next collected.

    Modules of vLLM refer to themselves: through their weight loaders, and by keeping their own
    methods. The collector stops all threads for as long as it takes to look at every object of
    the process, some hundred milliseconds of a vLLM worker in which no token would come. So the
    cycles are cut instead: each part loses all that it has. Parts that ``others`` have too stay as
    they are, and rotary embeddings, which vLLM keeps for layers to come.
    """
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT  # noqa: PLC0415

    shared = {id(part) for other in (*others, *_ROPE_DICT.values()) for part in other.modules()}
    for part in [part for part in module.modules() if id(part) not in shared]:
        part.__dict__.clear()


@contextmanager
def _short_turns() -> Iterator[None]:
    """Have threads hand on Python's lock sooner; entered by one thread at a time.

    A step of the model asks for that lock again after every operator, and waits each time for as
    long as the interval, 5 ms, while another thread runs Python.
    """
    usual = sys.getswitchinterval()
    sys.setswitchinterval(min(usual, _SHORT_TURN_S))
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


@contextmanager
def _stream_of_its_own(device: Any) -> Iterator[None]:
    """Have this thread's work on a GPU done beside that of the steps, and be done at the end.

    A fresh thread works in the legacy default stream, which comes after and before all that other
    blocking streams are given; and to wait for the device would mean to wait for steps as well.
    """
    if device.type != "cuda":
        yield
        return
    import torch  # noqa: PLC0415

    new_stream: Any = torch.cuda.Stream
    stream = new_stream(device)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield
        stream.synchronize()  # the steps compute in another one


def _forget_missing_names(*models: Any) -> None:
    """vLLM remembers by ``id`` which layers a model lacks."""
    from vllm.model_executor.models import utils  # noqa: PLC0415

    for model in models:
        utils._model_to_pp_missing_layer_names.pop(id(model), None)


def _trim_heap() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        return  # another C library, which gives memory back by itself or not at all


_thread = threading.local()


@contextmanager
def default_dtype(dtype: Any) -> Iterator[None]:
    """``torch.set_default_dtype`` for this thread alone.

    torch's own is of the process: the serving thread would make tensors of the wrong dtype.
    """
    import torch  # noqa: PLC0415
    from torch.overrides import TorchFunctionMode  # noqa: PLC0415

    if torch.get_default_dtype() == dtype:
        yield
        return
    factories = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)

    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = dict(kwargs or {})
            if func in factories and kwargs.get("dtype") is None:
                kwargs["dtype"] = dtype
            return func(*args, **kwargs)

    if not hasattr(torch.get_default_dtype, "pipelive"):
        original = torch.get_default_dtype

        def get_default_dtype() -> Any:
            return getattr(_thread, "dtype", None) or original()

        get_default_dtype.pipelive = True  # type: ignore[attr-defined]
        torch.get_default_dtype = get_default_dtype
    _thread.dtype = dtype
    try:
        with Mode():
            yield
    finally:
        _thread.dtype = None
