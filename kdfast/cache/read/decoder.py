"""A cache's codec, ready to decode: with its assets, and with the model of the shards it is for."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdfast.cache.codecs.base import Codec
from kdfast.cache.errors import CacheCorruptError, CacheError
from kdfast.cache.format.regular import read_regular
from kdfast.cache.format.shard import Shard
from kdfast.cache.format.storage import MOST_READ
from kdfast.labels import SoftLabels

__all__ = ["Decoder"]


class Decoder:
    """The codec of some shards, ready to decode. Shards of one cache with equal models share one, in each process.

    It pickles as the path of a shard, so that labels sent from a loader's worker do not drag tables along.
    """

    def __init__(self, codec: Codec, digest: bytes, shard: Path) -> None:
        self.codec, self.digest, self._shard = codec, digest, shard

    @classmethod
    def of(cls, shard: Shard, fetch: Callable[[str], Path] | None = None) -> Decoder:
        """The decoder of ``shard``, made if need be.

        Args:
            fetch: gives the local file of an asset by its name; by default assets lie beside the shard.

        Raises:
            CacheError: there is no such codec, or it cannot be built, or an asset is missing; the message names it.
            CacheCorruptError: the codec refuses the shard's model.
        """
        digest = _digest(shard)
        decoder = _decoders.get(digest)
        if decoder is None:
            decoder = cls(_make(shard, fetch or shard.path.with_name), digest, shard.path)
            _decoders[digest] = decoder
        return decoder

    def decode(self, data: NDArray[np.uint8], units: NDArray[np.int64], wanted: NDArray[np.int64]) -> SoftLabels:
        """Rows ``wanted`` of the units in ``data``, as ``Codec.decode`` takes them."""
        return self.codec.decode(data, units, wanted)

    def decode_on_device(self, data: Tensor, units: NDArray[np.int64], wanted: NDArray[np.int64]) -> SoftLabels | None:
        """``decode`` on the device that holds ``data``; None where the codec cannot."""
        return self.codec.decode_on_device(data, units, wanted)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.digest, self._shard)


# By what decides how bytes are decoded. Held as long as a reader or labels that need it are.
_decoders: WeakValueDictionary[bytes, Decoder] = WeakValueDictionary()


def _restore(digest: bytes, path: Path) -> Decoder:
    decoder = _decoders.get(digest)
    if decoder is None:
        decoder = Decoder.of(Shard(path))
        if decoder.digest != digest:
            raise CacheCorruptError(f"{path}: has been replaced since labels were packed from it")
    return decoder


def _digest(shard: Shard) -> bytes:
    # The folder takes part because assets are found there.
    what = [str(shard.path.parent), *(str(value) for value in vars(shard.meta).values())]
    return blake2b(json.dumps(what).encode() + b"\0" + shard.model, digest_size=16).digest()


def _make(shard: Shard, fetch: Callable[[str], Path]) -> Codec:
    def read_asset(name: str) -> bytes:
        try:
            return read_regular(fetch(name), MOST_READ)
        except FileNotFoundError as error:
            where = shard.path.with_name(name)
            raise CacheError(f"{where}: is missing, and {shard.path.name} cannot be decoded without it") from error

    codec = shard.meta.make_codec(read_asset, shard.path.parent)
    if codec.learn_rows and not shard.model:
        if shard.rows:
            raise CacheCorruptError(f"{shard.path}: codec {codec.name!r} needs a model, and the shard holds none")
        return codec  # records without rows have taught its writer nothing, and nothing is to be decoded
    try:
        codec.use_model(shard.model)
    except ValueError as error:
        raise CacheCorruptError(f"{shard.path}: its codec_model cannot be used: {error}") from error
    return codec
