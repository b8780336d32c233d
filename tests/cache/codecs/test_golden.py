"""Caches written once, and never again: what they hold is what a later version must read."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import kdfast.cache
from plain_decoder import decode_entry_block, decode_row, read_tables
from support import ROOT

V1 = ROOT / "tests" / "fixtures" / "v1"
NAMES = sorted(path.name for path in V1.iterdir())
CONTEXTS = 576
ENTRY_CODECS = ("sample", "scored", "threshold", "prototype")


def test_every_codec_has_a_fixture():
    stored = {kdfast.cache.open(V1 / name).info.codec for name in NAMES}
    assert stored == {"dense", "hard", "hidden", "prototype", "sample", "scored", "threshold", "topk"}
    assert len(NAMES) == 22


@pytest.mark.parametrize("name", NAMES)
def test_labels_stay_what_they_were(name):
    cache = kdfast.cache.open(V1 / name)
    cache.verify()
    labels = cache.gather(range(len(cache)))
    for field, expected in load_file(V1 / name / "labels.safetensors").items():
        found = getattr(labels, {"shape": "prototype_ids"}.get(field, field))  # its name when the files were made
        assert found.dtype == expected.dtype
        if field in ("values", "tails"):  # exp and log differ in the last bit from one machine to the next
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(found, expected)


def read(name):
    """A shard as any safetensors reader gives it: metadata, tensors."""
    (path,) = (V1 / name).glob("shard-*.safetensors")
    with safe_open(path, framework="np") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def orders(name, metadata, config, model, header_fields):
    """(orders, V): ids by rank, from the shapes or from the model's classes."""
    vocab = int(metadata["vocab_size"])
    if config["coding"] == "plain":
        return np.arange(vocab)[None]
    if "shapes" not in config:
        _, at = read_tables(model, header_fields + CONTEXTS)
        tables, end = read_tables(model[at:], 2 + CONTEXTS)
        classes = decode_entry_block(model[at + end :], vocab, tables, header_fields=2).headers
        return np.array(sorted(range(vocab), key=lambda i: (classes[i][1], i)))[None]
    table = load_file(V1 / name / f"shapes-{config['shapes']}.safetensors")
    rows = []
    for codes, first in zip(table["codes"].tolist(), table["favourites"].tolist(), strict=True):
        rest = sorted(set(range(vocab)) - set(first), key=lambda i: (codes[i], i))
        rows.append(first + rest)
    return np.array(rows)


def limits(codec, config, metadata):
    """Of header fields and values, as FORMAT.md has them."""
    vocab = int(metadata["vocab_size"])
    shapes = [3] if "shapes" in config else []
    if codec == "sample":
        return [min(config["draws"], vocab) + 1, *shapes], config["draws"]
    if codec == "scored":
        return [min(config["draws"] + 1, vocab) + 1], 2**17
    if codec == "threshold":
        return [min(-int(-1 // config["tau"]) + 1, vocab) + 1, *shapes], 2 + int(
            np.ceil(config["steps"] * np.log2(1 / config["tau"]))
        )
    tail, share = int(12 / config["tail_step"]), int(12 / config["share_step"])
    return [config["k"] + 1, *shapes, 2 * tail + 2], 2 * share + 1


def plain_rows(name):
    """Columns, ids and values of every row, without the extension."""
    metadata, tensors = read(name)
    config = json.loads(metadata["codec_config"])
    codec = metadata["codec"]
    header, value_limit = limits(codec, config, metadata)
    model = tensors.get("codec_model", np.empty(0, np.uint8)).tobytes()
    order = orders(name, metadata, config, model, len(header))
    for begin, length, _, rows in tensors["block_index"].tolist():
        block = tensors["payload"][begin : begin + length].tobytes()
        if config["coding"] == "blocks":
            tables, _ = read_tables(model, len(header) + CONTEXTS)
            total = config["draws"] if codec == "sample" else 0
            found = decode_entry_block(block, rows, tables, header_fields=len(header), total=total)
            pairs = zip(found.headers, found.entries, strict=True)
        else:
            whole = 8 if config["coding"] == "plain" else 1
            bits = [-(-(limit - 1).bit_length() // whole) * whole for limit in (*header, value_limit)]
            rank_bits = -(-(int(metadata["vocab_size"]) - 1).bit_length() // whole) * whole
            options = {"header_bits": bits[:-1], "value_bits": bits[-1], "rank_bits": rank_bits}
            pairs = [decode_row(block, rows, row, **options, classes=whole == 1) for row in range(rows)]
        for numbers, entries in pairs:
            which = order[numbers[1] if len(order) > 1 else 0]
            yield codec, config, numbers, [(int(which[rank]), value) for rank, value in entries]


def weights(codec, config, numbers, values):
    """The probabilities or weights of a row's entries, and its tail mass, as FORMAT.md has them."""
    if codec == "sample":
        return [(v + 1) / config["draws"] for v in values], None
    if codec == "scored":
        return [(int(config["draws"] * np.exp(-(v // 4) / 1024)) + v % 4 - 1) / config["draws"] for v in values], None
    if codec == "threshold":
        return [2 ** (-(v - 1) / config["steps"]) if v else config["tau"] for v in values], None

    def sigmoid(c, step):
        return 1 / (1 + np.exp(-(c - int(12 / step)) * step))

    code = numbers[2]
    tail = 0.0 if code == 2 * int(12 / config["tail_step"]) + 1 else sigmoid(code, config["tail_step"])
    left, out = 1 - tail, []
    for i, v in enumerate(values):
        share = 1.0 if i == len(values) - 1 else sigmoid(v, config["share_step"])
        out.append(left * share)
        left *= 1 - share
    return out, tail


@pytest.mark.parametrize("name", [name for name in NAMES if name.split("-")[0] in ENTRY_CODECS])
def test_the_format_s_text_gives_the_same_labels(name):
    expected = load_file(V1 / name / "labels.safetensors")
    offsets = expected["offsets"].tolist()
    rows = list(plain_rows(name))
    assert len(rows) == len(offsets) - 1
    for row, (codec, config, numbers, entries) in enumerate(rows):
        span = slice(offsets[row], offsets[row + 1])
        assert [i for i, _ in entries] == expected["ids"][span].tolist()
        probs, tail = weights(codec, config, numbers, [v for _, v in entries])
        assert probs == pytest.approx(expected["values"][span].tolist(), rel=1e-5)
        if tail is not None:
            assert tail == pytest.approx(expected["tails"][0, row].exp().item(), rel=1e-5)
            assert numbers[1] == expected["shape"][row].item()
