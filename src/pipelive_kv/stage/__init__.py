"""A pipeline stage: what a worker process of the engine holds."""

from pipelive_kv.stage.hooks import EngineHooks, LayerWeights
from pipelive_kv.stage.stage import Stage, Step

__all__ = ["EngineHooks", "LayerWeights", "Stage", "Step"]
