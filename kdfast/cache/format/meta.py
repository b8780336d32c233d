"""What all shards of one cache share, kept in each shard's ``__metadata__``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

from kdfast._version import __version__
from kdfast.cache import codecs
from kdfast.cache.codecs.base import LARGEST, MAX_VOCAB, SMALLEST, Codec
from kdfast.cache.errors import CacheCorruptError, CacheError, CacheMismatchError
from kdfast.cache.format.strict import parse_integer, parse_json

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

    def make_codec(self, read_asset: Callable[[str], bytes], where: object) -> Codec:
        """Make the codec that wrote the cache, without its model.

        Args:
            read_asset: gives the bytes of a file beside the shards, by its name.
            where: the cache, or a file of it, for messages.

        Raises:
            CacheError: there is no such codec, or not with these options or assets.
            OSError: an asset cannot be read.
        """

        def read_own(name: str) -> bytes:
            if PurePath(name).name != name:
                raise CacheCorruptError(f"{where}: its asset {name!r} is no file of the cache's own")
            return read_asset(name)

        try:
            codec = codecs.restore(self.codec, self.vocab_size, self.temperatures, self.config, read_own)
            options = _json(codec.config())
        except CacheError:
            raise
        # Options may be anything.
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise CacheError(f"{where}: its labels cannot be decoded: {error}") from error
        if options != _json(self.config):
            raise CacheError(
                f"{where}: its labels cannot be decoded: its options {_json(self.config):.200} are not those that "
                f"codec {self.codec!r} writes"
            )
        return codec

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
        missing = [
            name for name in ("codec", "codec_config", "vocab_size", "temperatures", "teacher") if name not in strings
        ]
        if missing:
            raise ValueError(f"its metadata lack {missing}")
        try:
            config, temperatures = parse_json(strings["codec_config"]), parse_json(strings["temperatures"])
            vocab_size = parse_integer(strings["vocab_size"], 1, MAX_VOCAB)
        except ValueError as error:
            raise ValueError(f"its metadata cannot be read: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(f"its codec_config is no JSON object: {strings['codec_config']:.80}")
        if not isinstance(temperatures, list) or not temperatures or not all(map(_is_temperature, temperatures)):
            raise ValueError(f"its temperatures are no JSON array of positive numbers: {strings['temperatures']:.80}")
        return cls(strings["codec"], config, vocab_size, tuple(map(float, temperatures)), strings["teacher"], keys)

    def require_equal(self, other: CacheMeta, ours: str, theirs: str) -> None:
        """Raise ``CacheMismatchError`` listing every field in which ``self`` (``ours``) and ``other`` differ."""
        mine, yours = asdict(self), asdict(other)
        different = [name for name in mine if mine[name] != yours[name]]
        if different:
            lists = [", ".join(f"{name}={side[name]!r}" for name in different) for side in (mine, yours)]
            raise CacheMismatchError(f"{ours} has {lists[0]}, but {theirs} has {lists[1]}")


def _is_temperature(number: Any) -> bool:
    return type(number) in (int, float) and SMALLEST <= number <= LARGEST


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
