"""Imports what every stage process needs; the fork server loads it once for all of them."""

import torch
import transformers  # noqa: F401
from transformers import AutoModelForCausalLM  # noqa: F401

import pipelive_kv.engines.reference.sampling
import pipelive_kv.engines.transformers
import pipelive_kv.stage  # noqa: F401

torch.set_num_threads(1)
