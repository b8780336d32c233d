"""What the fuzzers start from: python tests/trust/seeds.py FOLDER

Writes the golden caches' models to FOLDER/models, and their blocks, behind the parameters that each harness takes from
the front of its input, to FOLDER/seeds.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np

import kdfast.cache
from kdfast.cache.codecs.entries import EntryCodec
from kdfast.cache.codecs.model import RANK_CONTEXTS, VALUE_CONTEXTS, _unpack_tables
from kdfast.cache.format.container import read_container
from kdfast.cache.format.shard import Shard
from kdfast.cache.read.decoder import Decoder

V1 = Path(__file__).resolve().parents[1] / "fixtures" / "v1"
CONTEXTS = RANK_CONTEXTS + VALUE_CONTEXTS


def main(folder: Path) -> None:
    seeds, models = folder / "seeds", []
    for name in ("entry_block", "row_block", "top_rows", "io"):
        (seeds / name).mkdir(parents=True)
        (seeds / name / "zeros").write_bytes(bytes(64))
    for path in sorted(V1.iterdir()):
        (shard_path,) = path.glob("shard-*.safetensors")
        shard, codec = Shard(shard_path), Decoder.of(Shard(shard_path)).codec
        if not isinstance(codec, EntryCodec):
            continue
        index = read_container(shard_path).tables["block_index"]
        blocks = [(bytes(shard.block(at)), int(index[at, 3])) for at in range(len(index))]
        if codec.coding == "blocks":
            models.append(
                _model(
                    codec.header_fields, codec.total, codec.max_entries, codec.vocab_size, codec._statistics.frequencies
                )
            )
            for at, (block, rows) in enumerate(blocks):
                head = struct.pack("<BBH", len(models) - 1, 0, rows)
                (seeds / "entry_block" / f"{path.name}-{at}").write_bytes(head + block)
        else:
            for at, (block, rows) in enumerate(blocks):
                (seeds / "row_block" / f"{path.name}-{at}").write_bytes(_layout(codec, rows) + block)
        if codec.learn_rows and codec.prototypes is None:  # the classes of ids, which are an entry block
            _, end = _unpack_tables(shard.model, 0, codec.header_fields + CONTEXTS)
            own, end = _unpack_tables(shard.model, end, 2 + CONTEXTS)
            if codec.vocab_size < 400:
                models.append(_model(2, 0, 0, 1, own))
                head = struct.pack("<BBH", len(models) - 1, 4, codec.vocab_size)
                (seeds / "entry_block" / f"{path.name}-classes").write_bytes(head + shard.model[end:])
    (folder / "models").write_bytes(b"".join(models))


def _model(fields: int, total: int, most: int, vocab: int, frequencies: np.ndarray) -> bytes:
    return struct.pack("<IIII", fields, total, most, vocab) + frequencies.astype("<u2").tobytes()


def _layout(codec: EntryCodec, rows: int) -> bytes:
    header, rank, value = codec.field_widths
    numbers = [len(header) - 1, *header, value, rank, codec.coding == "rows"]
    limits = struct.pack("<HH", codec.total, codec.max_entries) + (codec.vocab_size - 1).to_bytes(3, "little")
    return bytes(numbers) + limits + struct.pack("<H", rows)


if __name__ == "__main__":
    assert kdfast.cache  # registers the codecs
    main(Path(sys.argv[1]))
