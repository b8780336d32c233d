"""DistillKit's two layouts of a row: what its compression config says, and how the bytes give log-probabilities.

The facts are those of github.com/arcee-ai/DistillKit (``distillkit/compression`` at a61c2e7); the code is ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdfast.cache.codecs.base import MAX_VOCAB
from kdfast.cache.convert.bits import FLOAT_BYTES, id_bits, read_bits, read_floats, read_words
from kdfast.cache.errors import CacheError, optional_package
from kdfast.cache.format.regular import read_regular

__all__ = ["Layout", "LegacyLayout", "QuantizedLayout", "read_layout"]

MOST_TERMS = 64  # powers of a rank, which beyond are not finite, and their number
MOST_CONFIG = 2**24  # bytes
MOST_MERGED, MOST_MEMBERS = 64, 1024  # mappings that ``<<`` in YAML names, and members that it gives


@dataclass(frozen=True)
class ResidualBin:
    """A scale, then ``count`` numbers of ``bits`` bits: residuals of the next entries, in units of the scale."""

    scale_dtype: str
    bits: int
    count: int

    @property
    def packed_bytes(self) -> int:
        return (self.bits * self.count + 7) // 8

    @property
    def nbytes(self) -> int:
        return FLOAT_BYTES[self.scale_dtype] + self.packed_bytes

    def read(self, data: NDArray[np.uint8]) -> NDArray[np.float64]:
        scale = read_floats(data[:, : FLOAT_BYTES[self.scale_dtype]], self.scale_dtype)
        codes = read_bits(data[:, FLOAT_BYTES[self.scale_dtype] :], self.bits, self.count)
        # One bit is a sign; more are a two's-complement range shifted to start at 0.
        levels = 2 * codes - 1 if self.bits == 1 else codes - 2 ** (self.bits - 1)
        return levels * scale


@dataclass(frozen=True)
class QuantizedLayout:
    """``logprob_compressor``: columns ``compressed_logprobs`` and ``bytepacked_indices``, bytes.

    Values: the first ``exact_k`` as they are, coefficients of ``terms`` of the rank t = 0, 1, ... among the others,
    residual bins. ``delta`` says that they are differences to the entry before. Ids: most significant bit first.
    """

    vocab_size: int
    k: int
    exact_k: int
    exact_dtype: str
    terms: tuple[int | str, ...]
    term_dtype: str
    bins: tuple[ResidualBin, ...]
    delta: bool
    normalize_t: bool

    columns = ("compressed_logprobs", "bytepacked_indices")

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> QuantizedLayout:
        bins = [
            ResidualBin(
                _dtype(b["scale_dtype"]), _integer(b, "element_bits", 1, 32), _integer(b, "num_elements", 0, MAX_VOCAB)
            )
            for b in config.get("residual_bins") or ()
        ]
        vocab_size, k, exact_k = _sizes(config, "d")
        if sum(b.count for b in bins) > k - exact_k:
            raise ValueError(f"residual_bins of {sum(b.count for b in bins)} numbers for {k - exact_k} entries")
        terms = tuple(_term(term) for term in config.get("polynomial_terms") or ())
        if len(terms) > MOST_TERMS:
            raise ValueError(f"{len(terms)} polynomial_terms, where at most {MOST_TERMS} are read")
        return cls(
            vocab_size=vocab_size,
            k=k,
            exact_k=exact_k,
            exact_dtype=_dtype(config.get("exact_dtype", "float32")),
            terms=terms,
            term_dtype=_dtype(config.get("term_dtype", "float32")),
            bins=tuple(bins),
            delta=bool(config.get("delta_encoding", True)),
            normalize_t=bool(config.get("normalize_t", False)),
        )

    @property
    def value_dtype(self) -> str:
        exact = self.exact_k == self.k and self.exact_dtype == "float16" and not self.delta
        return "float16" if exact else "float32"

    def nbytes(self, column: str) -> int:
        """Bytes of one row of ``column``."""
        if column == "bytepacked_indices":
            return (self.k * id_bits(self.vocab_size) + 7) // 8
        floats = self.exact_k * FLOAT_BYTES[self.exact_dtype] + len(self.terms) * FLOAT_BYTES[self.term_dtype]
        return floats + sum(b.nbytes for b in self.bins)

    def kind(self, column: str) -> str:
        """What the numbers of a row of ``column`` are, as ``matrix`` takes it."""
        return "bytes"

    def ids(self, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        return read_bits(columns["bytepacked_indices"], id_bits(self.vocab_size), self.k)

    def log_probs(self, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        data, approximated = columns["compressed_logprobs"], self.k - self.exact_k
        at = self.exact_k * FLOAT_BYTES[self.exact_dtype]
        exact = read_floats(data[:, :at], self.exact_dtype)
        rest = np.zeros((len(data), approximated))
        if self.terms:
            end = at + len(self.terms) * FLOAT_BYTES[self.term_dtype]
            rest += read_floats(data[:, at:end], self.term_dtype) @ self._basis(approximated)
            at = end
        entry = 0
        for residuals in self.bins:
            rest[:, entry : entry + residuals.count] += residuals.read(data[:, at : at + residuals.nbytes])
            entry, at = entry + residuals.count, at + residuals.nbytes
        values = np.concatenate([exact, rest], 1)
        return values.cumsum(1) if self.delta else values

    def _basis(self, count: int) -> NDArray[np.float64]:
        """(terms, count): each term at each rank."""
        t = np.linspace(0, 1, count) if self.normalize_t else np.arange(count, dtype=np.float64)
        special = {"sqrt": np.sqrt, "exp": np.exp}
        return np.stack([special[term](t) if isinstance(term, str) else t**term for term in self.terms])


@dataclass(frozen=True)
class LegacyLayout:
    """``legacy_logit_compression``: columns ``packed_indices`` (u64), ``exact_values`` and ``coeffs`` (floats).

    The approximated values are a polynomial of the rank a = 1, 2, ..., or of 1 / a. Ids: as many as fit in each
    64-bit word, the first in its lowest bits.
    """

    vocab_size: int
    k: int
    exact_k: int
    degree: int
    inverted: bool
    sqrt: bool

    columns = ("packed_indices", "exact_values", "coeffs")
    value_dtype = "float32"

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> LegacyLayout:
        vocab_size, k, exact_k = _sizes(config, "vocab_size")
        return cls(
            vocab_size=vocab_size,
            k=k,
            exact_k=exact_k,
            degree=_integer(config, "polynomial_degree", 0, MOST_TERMS),
            inverted=bool(config.get("invert_polynomial", True)),
            sqrt=bool(config.get("with_sqrt_term", False)),
        )

    def nbytes(self, column: str) -> int:
        """Numbers, not bytes, of one row of ``column``."""
        per_word = 64 // id_bits(self.vocab_size)
        terms = (self.degree + 1 + self.sqrt) if self.exact_k < self.k else 0
        return {"packed_indices": -(-self.k // per_word), "exact_values": self.exact_k, "coeffs": terms}[column]

    def kind(self, column: str) -> str:
        """What the numbers of a row of ``column`` are, as ``matrix`` takes it."""
        return "words" if column == "packed_indices" else "floats"

    def ids(self, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        return read_words(columns["packed_indices"].astype(np.uint64), id_bits(self.vocab_size), self.k)

    def log_probs(self, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        exact = columns["exact_values"].astype(np.float64)
        if self.exact_k == self.k:
            return exact
        a = np.arange(1, self.k - self.exact_k + 1, dtype=np.float64)
        basis = [a ** (-i if self.inverted else i) for i in range(self.degree + 1)]
        basis += [np.sqrt(a)] if self.sqrt else []
        return np.concatenate([exact, columns["coeffs"].astype(np.float64) @ np.stack(basis)], 1)


Layout = QuantizedLayout | LegacyLayout


def read_layout(path: Path) -> Layout:
    """The layout that a compression config (YAML or JSON) describes, or a training config's ``teacher`` section.

    Raises:
        CacheError: it describes none; the message names the file and what is wrong.
    """
    try:
        text = read_regular(path, MOST_CONFIG).decode("utf-8")
    except UnicodeError as error:
        raise CacheError(f"{path}: is no text: {error}") from error
    try:
        config = json.loads(text) if path.suffix == ".json" else _parse_yaml(text)
    except RecursionError as error:
        raise CacheError(f"{path}: is nested too deeply") from error
    except CacheError:
        raise
    except Exception as error:  # PyYAML lets through what a tag's constructor raises, of any class
        raise CacheError(f"{path}: is not {'JSON' if path.suffix == '.json' else 'YAML'}: {error}") from error
    try:
        config = config.get("teacher", config)
        if "legacy_logit_compression" in config:
            return LegacyLayout.of(config["legacy_logit_compression"])
        if "polynomial_degree" in config:
            return LegacyLayout.of(config)
        return QuantizedLayout.of(config.get("logprob_compressor", config))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CacheError(f"{path}: is not a DistillKit compression config: {error!r:.300}") from error


def _parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises what PyYAML raises, and its error for merge keys that would multiply."""
    yaml = optional_package("yaml", "reading YAML")

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined,misc]
        """The safe loader, with bounds on ``<<``: a mapping of ten that merge ten each, and so on, fills the memory."""

        def flatten_mapping(self, node: Any) -> None:
            merged = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
            sources = sum(len(value.value) if isinstance(value, yaml.SequenceNode) else 1 for value in merged)
            super().flatten_mapping(node)
            if sources > MOST_MERGED or (sources and len(node.value) > MOST_MEMBERS):
                raise yaml.constructor.ConstructorError(None, None, "more is merged than a config has", node.start_mark)

    return yaml.load(text, Loader)


def _sizes(config: Mapping[str, Any], vocabulary: str) -> tuple[int, int, int]:
    """The vocabulary's size, the entries of a row, and how many of these are exact: they decide what is allocated."""
    vocab_size = _integer(config, vocabulary, 2, MAX_VOCAB)
    k = _integer(config, "k", 1, vocab_size)
    return vocab_size, k, _integer(config, "exact_k", 0, k)


def _integer(config: Mapping[str, Any], name: str, low: int, high: int) -> int:
    number = config[name]
    if type(number) is not int or not low <= number <= high:
        shown = number if type(number) in (bool, float, int) else type(number).__name__
        raise ValueError(f"{name} must be an integer in [{low}, {high}], got {shown}")
    return number


def _dtype(name: Any) -> str:
    if not isinstance(name, str) or name not in FLOAT_BYTES:
        raise ValueError(f"a dtype is none of {sorted(FLOAT_BYTES)}")
    return name


def _term(term: Any) -> int | str:
    if type(term) is int and 0 <= term <= MOST_TERMS:
        return term
    if isinstance(term, str) and term in ("sqrt", "exp"):
        return term
    shown = term if type(term) in (int, float, str) else type(term).__name__
    raise ValueError(f"polynomial term {shown!r} is neither a power up to {MOST_TERMS}, nor 'sqrt', nor 'exp'")
