"""One digest over texts and tensors: what every fingerprint is made of."""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

__all__ = ["TensorDigest"]

CHUNK_BYTES = 2**26  # of a tensor on its way to the host


class TensorDigest:
    """A BLAKE2b-128 digest. Each item goes in with its length, so that no two lists of items are the same bytes."""

    def __init__(self) -> None:
        self._hash = blake2b(digest_size=16, person=b"kdfast:finger")

    def text(self, text: str) -> None:
        """Add a text, as UTF-8."""
        data = text.encode("utf-8", "surrogatepass")
        self._hash.update(len(data).to_bytes(8, "little"))
        self._hash.update(data)

    def tensor(self, name: str, tensor: Tensor) -> None:
        """Add a tensor: its name, dtype, shape and bytes, wherever the tensor lies and whatever its strides are.

        Raises:
            ValueError: a tensor without data (on the meta device).
        """
        if tensor.device.type == "meta":
            raise ValueError(f"{name} is on the meta device: load the weights before taking their fingerprint")
        self.text(f"{name} {tensor.dtype} {tuple(tensor.shape)}")
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        for start in range(0, flat.numel(), CHUNK_BYTES):
            self._hash.update(flat[start : start + CHUNK_BYTES].cpu().numpy().data)

    def hex(self) -> str:
        """The digest of what was added so far, 32 hexadecimal digits."""
        return self._hash.hexdigest()
