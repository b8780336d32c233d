"""What all shards of one cache share, kept in each shard's ``__metadata__``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kdfast._version import __version__
from kdfast.cache import codecs
from kdfast.cache.codecs.base import Codec
from kdfast.cache.errors import CacheError, CacheMismatchError

__all__ = ["FORMAT", "FORMAT_VERSION", "HASH", "RANGE", "CacheMeta"]

FORMAT = "kdfast-cache"
FORMAT_VERSION = 1
HASH, RANGE = "hash", "range"  # how a shard names its records: by their digests, or by consecutive integers


@dataclass(frozen=True)
class CacheMeta:
    """Codec, options, vocabulary, temperatures and teacher. Shards with equal ones belong to one cache."""

    codec: str
    config: dict[str, Any]
    vocab_size: int
    temperatures: tuple[float, ...]
    teacher: str
    keys: str = HASH

    @classmethod
    def of(cls, codec: Codec, teacher: str, keys: str = HASH) -> CacheMeta:
        return cls(codec.name, codec.config(), codec.vocab_size, codec.temperatures, teacher, keys)

    def make_codec(self, read_asset: Callable[[str], bytes]) -> Codec:
        """Make the codec that wrote the cache, without its model. ``read_asset(file name)`` gives an asset's bytes.

        Raises:
            ValueError, TypeError: there is no such codec, or not with these options or assets.
            OSError: an asset cannot be read.
        """
        return codecs.restore(self.codec, self.vocab_size, self.temperatures, self.config, read_asset)

    def to_strings(self) -> dict[str, str]:
        """The fields as safetensors metadata, which is a map of strings."""
        return {
            "format": FORMAT,
            "version": str(FORMAT_VERSION),
            "codec": self.codec,
            "codec_config": _json(self.config),
            "vocab_size": str(self.vocab_size),
            "temperatures": _json(self.temperatures),
            "teacher": self.teacher,
            "keys": self.keys,
            "kdfast": __version__,
        }

    @classmethod
    def from_strings(cls, strings: Mapping[str, str]) -> CacheMeta:
        """Read what ``to_strings`` gave. Raises ``CacheError`` for another format or version, else ``ValueError``."""
        if strings.get("format") != FORMAT:
            raise CacheError(f"is not a {FORMAT} file (its format is {strings.get('format')!r})")
        if strings.get("version") != str(FORMAT_VERSION):
            raise CacheError(f"has format version {strings.get('version')}, this kdfast reads {FORMAT_VERSION}")
        keys = strings.get("keys", HASH)
        if keys not in (HASH, RANGE):
            raise CacheError(f"has keys {keys!r}, this kdfast reads {HASH!r} and {RANGE!r}")
        try:
            config, temperatures = json.loads(strings["codec_config"]), json.loads(strings["temperatures"])
            vocab_size = int(strings["vocab_size"])
            temperatures = tuple(map(float, temperatures))
            return cls(strings["codec"], dict(config), vocab_size, temperatures, strings["teacher"], keys)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"metadata cannot be read: {error!r}") from error

    def require_equal(self, other: CacheMeta, ours: str, theirs: str) -> None:
        """Raise ``CacheMismatchError`` listing every field in which ``self`` (``ours``) and ``other`` differ."""
        mine, yours = asdict(self), asdict(other)
        different = [name for name in mine if mine[name] != yours[name]]
        if different:
            lists = [", ".join(f"{name}={side[name]!r}" for name in different) for side in (mine, yours)]
            raise CacheMismatchError(f"{ours} has {lists[0]}, but {theirs} has {lists[1]}")


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
