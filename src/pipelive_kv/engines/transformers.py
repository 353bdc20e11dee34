"""A pipeline stage of a Hugging Face causal language model, over documented plug-in points only.

The model is built without weights; the layers that the stage holds are given views of the weight
arena, all others are pass-through modules under their old indices (some families choose rope and
window by index). Moving a layer in or out replaces one pointer.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.dlpack import from_dlpack
from transformers import AutoConfig, AutoModelForCausalLM

from pipelive_kv.engines.transformers_checks import (
    Skeleton,
    UnsupportedModelError,
    check_class,
    check_config,
    examine,
)
from pipelive_kv.engines.transformers_paged import (
    PagedCache,
    StepBatch,
    forward_keywords,
    register,
)
from pipelive_kv.errors import InvalidArgumentError
from pipelive_kv.placement import Placement
from pipelive_kv.spec import KVSpec
from pipelive_kv.stage import EngineHooks, LayerWeights
from pipelive_kv.weights import (
    SafetensorsSource,
    TensorSpec,
    WeightArena,
    WeightSource,
    check_layout,
)

__all__ = [
    "StepBatch",
    "TransformersModel",
    "TransformersStage",
    "UnsupportedModelError",
]


Dtype = Literal["float32", "bfloat16", "float16"]


class _PassThrough(nn.Module):
    """Stands for a layer that another stage holds."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


class TransformersModel:
    """What can be known of a model without its weights.

    Args:
        path: a folder with config.json.
        dtype: of weights, activations and KV: "float32", "bfloat16" or "float16".

    Raises:
        UnsupportedModelError: if the adapter cannot run the model.
    """

    def __init__(self, path: Path | str, *, dtype: Dtype = "float32") -> None:
        if dtype not in get_args(Dtype):
            raise InvalidArgumentError(f"dtype is {dtype!r}; expected float32, bfloat16 or float16")
        self.path = Path(path)
        self.dtype = dtype
        self.config = AutoConfig.from_pretrained(self.path)
        check_config(self.config)
        # Of the same class and settings, made by nobody else: a stage changes it.
        self.skeleton = self.build()

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return int(self.config.num_hidden_layers)

    @property
    def hidden_size(self) -> int:
        """Elements of one token's hidden state, as it passes from stage to stage."""
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Elements of one row of logits."""
        return int(self.config.vocab_size)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        found = self.config.eos_token_id
        if found is None:
            return ()
        return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)

    def kv_spec(self, *, block_size: int = 16, order: Literal["hnd", "nhd"] = "hnd") -> KVSpec:
        """Return the KV geometry of one layer."""
        heads = int(self.config.num_attention_heads)
        width = getattr(self.config, "head_dim", None) or self.hidden_size // heads
        kv_heads = getattr(self.config, "num_key_value_heads", None) or heads
        return KVSpec(
            num_kv_heads=int(kv_heads),
            head_dim=int(width),
            dtype=self.dtype,
            block_size=block_size,
            order=order,
        )

    def layer_layout(self, layer: int) -> tuple[TensorSpec, ...]:
        """Return the weights that a layer needs, sorted by name."""
        if not 0 <= layer < self.num_layers:
            raise InvalidArgumentError(f"layer is {layer}; expected 0 to {self.num_layers - 1}")
        state = self.skeleton.layers[layer].state_dict()
        return tuple(
            TensorSpec(name, self.dtype, tuple(state[name].shape)) for name in sorted(state)
        )

    def open_weights(self) -> SafetensorsSource:
        """Open the checkpoint in the model's folder and check every layer's names and shapes.

        Raises:
            WeightsError: if something is missing or not of the right shape.
        """
        source = SafetensorsSource(self.path, dtype=self.dtype, prefix=self.skeleton.layer_prefix)
        try:
            self.check_weights(source)
        except BaseException:
            source.close()
            raise
        return source

    def check_weights(self, source: WeightSource) -> None:
        """Check every layer's names, shapes and dtypes; nothing is read.

        Raises:
            WeightsError: naming the layer and what differs.
        """
        for layer in range(self.num_layers):
            check_layout(
                source.layout(layer), self.layer_layout(layer), where=f"{self.path}: layer {layer}"
            )

    def build(self) -> Skeleton:
        """Make the model on the meta device, with nothing behind its parameters."""
        config = copy.deepcopy(self.config)
        check_class(config)
        make: Any = AutoModelForCausalLM.from_config
        with torch.device("meta"):
            model = make(config, dtype=getattr(torch, self.dtype), attn_implementation=register())
        model.eval().requires_grad_(False)
        return examine(model)


class TransformersStage(EngineHooks):
    """One stage's share of a model; also the engine hooks of its `Stage`.

    `prepare` may run in a background thread while `forward` runs; `forward`, `activate` and
    `retire` belong to the thread that runs the steps.

    Args:
        model: the model; several stages may be made from one.
        rank: of this stage. Whoever holds the first layer embeds, whoever holds the last one has
            norm and head, which therefore come and go with these layers.
        kv: gives the KV view of a layer, `KVPool.layer`.
        weights: where embedding, final norm and head come from.
        device: of layers, KV and everything that `forward` takes and returns: "cpu" or "cuda:0".

    Raises:
        UnsupportedModelError: if the model does more between layers than pass hidden states on.
    """

    def __init__(
        self,
        model: TransformersModel,
        *,
        rank: int,
        kv: Callable[[int], Any],
        weights: SafetensorsSource,
        device: str | torch.device = "cpu",
    ) -> None:
        if rank < 0:
            raise InvalidArgumentError(f"rank is {rank}; expected 0 or more")
        self.model = model
        self.rank = rank
        self.device = torch.device(device)
        self.is_first = self.is_last = False
        self._parts = model.build()
        self._templates = list(self._parts.layers)
        self._idle = [_PassThrough() for _ in self._templates]
        self._ready: dict[int, nn.Module] = {}
        self._running: frozenset[int] = frozenset()
        self._lock = threading.Lock()
        self._cache = PagedCache(model.num_layers, kv)
        self._gate: Callable[[int], None] | None = None
        self._entry: torch.Tensor | None = None
        for index, idle in enumerate(self._idle):
            self._parts.layers[index] = idle
            if index == 0:
                idle.register_forward_pre_hook(self._enter, with_kwargs=True)
        _real_buffers(self._parts.model, self._parts.model, self.device)
        self._weights = weights
        self._norm = getattr(self._parts.base, self._parts.norm_name)
        self._no_norm = nn.Identity()
        setattr(self._parts.base, self._parts.norm_name, self._no_norm)
        self._check_transparent()

    # -- engine hooks ------------------------------------------------------------------------

    def prepare(self, layers: Sequence[int], arena: LayerWeights | None) -> None:
        """Build the modules of layers whose weights lie in the arena; nothing is copied.

        Raises:
            WeightsError, InvalidArgumentError: if a layer is not held by the arena or does not
                fit, or embedding, norm or head cannot be loaded; none of the layers is prepared
                then.
        """
        if not isinstance(arena, WeightArena):
            raise InvalidArgumentError(
                f"arena is a {type(arena).__name__}; expected a WeightArena, where modules take "
                "their weights from"
            )
        built = {layer: self._build(layer, arena) for layer in layers}
        self._load_ends(layers)
        with self._lock:
            self._ready.update(built)

    def warmup(self, placement: Placement) -> None:
        """Nothing to do: there are no graphs to capture."""

    def activate(self, placement: Placement) -> None:
        """Run the placement's layers of this stage from the next forward on.

        Swaps pointers: it neither allocates device memory nor fails for prepared layers.

        Raises:
            InvalidArgumentError: the placement is of another model, or a layer was not prepared;
                nothing has changed.
        """
        held = placement.layers_of(self.rank)
        missing = [layer for layer in held if layer not in self._ready]
        if missing or placement.num_layers != len(self._idle):
            raise InvalidArgumentError(
                f"placement {placement}: the model has {len(self._idle)} layers; "
                f"layers {missing} of stage {self.rank} were not prepared"
            )
        running = frozenset(held)
        for index in running ^ self._running:  # a step waits for this
            self._parts.layers[index] = (
                self._ready[index] if index in running else self._idle[index]
            )
        self._running = running
        self.is_first = 0 in running
        if self.is_last != (len(self._idle) - 1 in running):
            self.is_last = not self.is_last
            norm = self._norm if self.is_last else self._no_norm
            setattr(self._parts.base, self._parts.norm_name, norm)

    def discard(self, layers: Sequence[int]) -> None:
        """Forget prepared layers that do not run (an abort); their memory may go then."""
        self._drop(layers)

    def retire(self, layers: Sequence[int]) -> None:
        """Forget layers that ran and no longer do; their memory may go then."""
        self._drop(layers)

    # -- running -----------------------------------------------------------------------------

    @property
    def active_layers(self) -> tuple[int, ...]:
        """Layers that `forward` runs, in order."""
        return tuple(
            index
            for index, module in enumerate(self._parts.layers)
            if module is not self._idle[index]
        )

    @torch.inference_mode()
    def forward(
        self,
        inputs: torch.Tensor,
        positions: torch.Tensor,
        batch: StepBatch,
        *,
        gate: Callable[[int], None] | None = None,
        logit_rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run one step's tokens, of all its requests in one row, through this stage's layers.

        Args:
            inputs: the first stage takes token ids, int64 [tokens]; the others hidden states
                [tokens, hidden_size] of the model's dtype.
            positions: int64 [tokens].
            batch: where the tokens' KV goes and what each may attend to.
            gate: called with every layer's index just before it runs (`Step.gate`).
            logit_rows: int64; tokens whose logits are wanted on the last stage; None: all.

        Returns:
            Hidden states [tokens, hidden_size], or logits [rows, vocab_size] on the last stage.
        """
        tokens = positions.shape[0]
        expected = (tokens,) if self.is_first else (tokens, self.model.hidden_size)
        if tuple(inputs.shape) != expected:
            raise InvalidArgumentError(
                f"inputs are {list(inputs.shape)}; expected {list(expected)} on stage {self.rank}"
            )
        keywords: dict[str, Any] = {"position_ids": positions.unsqueeze(0)}
        keywords.update(forward_keywords(self._cache))
        if self.is_first:
            keywords["input_ids"] = inputs.unsqueeze(0)
        else:
            keywords["inputs_embeds"] = self._entry = inputs.unsqueeze(0)
        self._cache.start(batch)
        self._gate = gate
        try:
            if not self.is_last:
                hidden: torch.Tensor = self._parts.base(**keywords).last_hidden_state
                return hidden[0]
            if logit_rows is not None:
                keywords["logits_to_keep"] = logit_rows
            logits: torch.Tensor = self._parts.model(**keywords).logits
            return logits[0]
        finally:
            self._cache.finish()
            self._gate = self._entry = None

    # -- parts -------------------------------------------------------------------------------

    def _build(self, layer: int, arena: WeightArena) -> nn.Module:
        if not 0 <= layer < len(self._templates):
            raise InvalidArgumentError(
                f"layer is {layer}; expected 0 to {len(self._templates) - 1}"
            )
        check_layout(arena.layout(layer), self.model.layer_layout(layer), where=f"layer {layer}")
        module = copy.deepcopy(self._templates[layer])
        views = {name: from_dlpack(view) for name, view in arena.tensors(layer).items()}
        module.load_state_dict(views, strict=True, assign=True)
        _real_buffers(module, self._parts.model, self.device)
        module.eval().requires_grad_(False)
        module.register_forward_pre_hook(self._before(layer), with_kwargs=True)
        if layer == 0:
            module.register_forward_pre_hook(self._enter, with_kwargs=True)
        return module

    def _before(self, layer: int) -> Callable[..., None]:
        def wait(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._gate is not None:
                self._gate(layer)

        return wait

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Let a later stage's hidden states in at layer 0, whatever the model did to its inputs.

        Some families scale what they take for embeddings; that happened on the first stage.
        """
        if self._entry is None:
            return None
        if args:
            return (self._entry, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._entry}

    def _drop(self, layers: Sequence[int]) -> None:
        for layer in layers:
            if self._parts.layers[layer] is not self._idle[layer]:
                raise InvalidArgumentError(f"layer {layer} is in use; activate without it first")
        with self._lock:
            for layer in layers:
                self._ready.pop(layer, None)
        self._unload_ends(layers)

    def _ends(self, layers: Sequence[int]) -> dict[str, nn.Module]:
        """What else than layers is run by whoever holds ``layers``, by name."""
        parts, found = self._parts, dict[str, nn.Module]()
        if 0 in layers:
            found[self._embedding_name] = parts.model.get_input_embeddings()
        if len(self._idle) - 1 in layers:
            head = parts.model.get_output_embeddings()
            found[f"{parts.base_name}.{parts.norm_name}"] = self._norm
            found[_name_of(parts.model, head)] = head
        return found

    @property
    def _embedding_name(self) -> str:
        return f"{self._parts.base_name}.{self._parts.embedding_name}"

    def _load_ends(self, layers: Sequence[int]) -> None:
        parts, embedding, weights = self._parts, self._embedding_name, self._weights
        wanted = self._ends(layers)
        loaded: dict[str, torch.Tensor] = {}
        for of in (parts.model.get_input_embeddings(), parts.model.get_output_embeddings()):
            if parts.tied and not of.weight.is_meta:
                loaded[f"{embedding}.weight"] = of.weight.detach()  # the other end has it already
        for module_name, module in wanted.items():
            state: dict[str, torch.Tensor] = {}
            for name, value in module.state_dict().items():
                full = f"{module_name}.{name}"
                if (
                    parts.tied
                    and module is parts.model.get_output_embeddings()
                    and name == "weight"
                ):
                    full = f"{embedding}.weight"
                if full not in loaded:
                    loaded[full] = _load(weights, full, value).to(self.device)
                state[name] = loaded[full]
            module.load_state_dict(state, strict=True, assign=True)
            module.requires_grad_(False)

    def _unload_ends(self, layers: Sequence[int]) -> None:
        for module in self._ends(layers).values():
            none = {name: value.to("meta") for name, value in module.state_dict().items()}
            module.load_state_dict(none, strict=True, assign=True)

    @torch.inference_mode()
    def _check_transparent(self) -> None:
        """Find out whether hidden states pass unchanged when no layer runs.

        A model that does anything else to them (a residual stream of its own, a projection behind
        the layers) would do it once per stage.
        """
        width, parts = self.model.hidden_size, self._parts
        probe = torch.linspace(-1, 1, 2 * width, device=self.device).reshape(1, 2, width)
        self._entry = probe.to(getattr(torch, self.model.dtype))
        try:
            result = parts.base(
                inputs_embeds=self._entry,
                position_ids=torch.arange(2, device=self.device).unsqueeze(0),
                **forward_keywords(self._cache),
            )
            same = torch.equal(result.last_hidden_state, self._entry)
        except Exception as error:
            raise UnsupportedModelError(
                f"{type(parts.model).__name__}: it cannot run without its layers: {error}"
            ) from error
        finally:
            self._entry = None
        if not same:
            raise UnsupportedModelError(
                f"{type(parts.model).__name__}: it changes hidden states outside its layers"
            )


def _load(weights: SafetensorsSource, name: str, like: torch.Tensor) -> torch.Tensor:
    expected = TensorSpec(name, str(like.dtype).removeprefix("torch."), tuple(like.shape))
    check_layout([weights.spec(name)], [expected], where=str(weights.path))
    value = torch.empty(like.shape, dtype=like.dtype)
    weights.load_tensor(name, value)
    return value


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    for name, module in model.named_modules():
        if module is wanted:
            return str(name)
    raise UnsupportedModelError(f"{type(model).__name__}: its head is not one of its modules")


def _real_buffers(root: nn.Module, model: Any, device: torch.device) -> None:
    """Give every buffer below `root` that is on the meta device its real, computed value.

    Buffers are not in the checkpoint (tables of rotary frequencies, scales of embeddings); the
    model's own initialisation computes them.
    """
    for name, module in root.named_modules():
        if not any(b is not None and b.is_meta for b in module.buffers(recurse=False)):
            continue
        for key, buffer in module.named_buffers(recurse=False):
            module._buffers[key] = (
                torch.full_like(buffer, torch.nan, device="cpu")
                if (buffer.is_floating_point())
                else torch.zeros_like(buffer, device="cpu")
            )
        with torch.no_grad():
            model._init_weights(module)
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and bool(buffer.isnan().any()):
                raise UnsupportedModelError(
                    f"{type(model).__name__}: the value of buffer {name}.{key} is not known"
                )
            module._buffers[key] = buffer.to(device)
