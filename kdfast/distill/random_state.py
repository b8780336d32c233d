"""All random numbers' generators of this process, as something that ``torch.load`` reads with ``weights_only``."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["random_state", "set_random_state"]


def random_state(generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """PyTorch's on the CPU and every GPU, Python's, NumPy's global one, and ``generators``'."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002  (what a dataset uses is not for us to choose)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (str(name), np.asarray(keys).tolist(), *rest),
        "generators": [generator.get_state() for generator in generators],
    }


def set_random_state(state: dict[str, Any], generators: Sequence[torch.Generator] = ()) -> None:
    """Go on from ``random_state``. Raises ``ValueError`` if it was of another number of generators."""
    if len(state["generators"]) != len(generators):
        raise ValueError(
            f"the state is of {len(state['generators'])} generators of a loader, this one has {len(generators)}"
        )
    torch.set_rng_state(state["torch"])
    for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda, device)
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))  # noqa: NPY002
    for generator, own in zip(generators, state["generators"], strict=True):
        generator.set_state(own)
