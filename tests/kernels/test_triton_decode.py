"""Packed labels decoded by Triton kernels: the CPU decoder's labels to the last bit, and its errors."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from kdfast.cache import CacheCorruptError, PackedLabels, codecs
from kdfast.cache.codecs import entries_on_device
from kdfast.cache.read.decoder import Decoder
from support.entry_checks import VOCAB, learned, make_logits, make_prototypes
from support.triton_device import DEVICE

CODECS = {
    "one draw": ("sample", {"draws": 1}),
    "sample": ("sample", {"draws": 12}),
    "sample by shape": ("sample", {"draws": 12, "prototypes": make_prototypes()}),
    "threshold": ("threshold", {"tau": 0.1}),
    "threshold by shape": ("threshold", {"tau": 0.2, "steps": 64, "prototypes": make_prototypes()}),
    "prototypes alone": ("prototype", {"k": 0, "prototypes": make_prototypes()}),
    "prototype": ("prototype", {"k": 1, "prototypes": make_prototypes()}),
    "fine prototype": ("prototype", {"k": 5, "tail_step": 0.01, "share_step": 0.01, "prototypes": make_prototypes()}),
}


def make_codec(name, coding="blocks", vocab=VOCAB, learn_from=200):
    kind, options = CODECS[name]
    codec = codecs.create(kind, vocab, [1.0], {**options, "coding": coding})
    return learned(codec, codec.select(make_logits(learn_from, vocab, seed=3), bytes(16)))


def pack(codec, rows):
    """A block of so many rows each, as units that do not touch; the second one holds some masked columns."""
    data, units = np.full(5, 255, np.uint8), []
    for seed, count in enumerate(rows):
        logits = make_logits(count, codec.vocab_size, seed, masked=0.3 * seed)
        block = np.frombuffer(codec.encode(codec.select(logits, bytes(range(16)))), np.uint8)
        whole = np.array([[len(data), len(block), count]])
        data = np.concatenate([data, block, np.full(3, 255, np.uint8)])
        if codec.coding != "blocks":
            spans = codec.locate(data, whole.repeat(count, 0), np.arange(count))
            whole = np.concatenate([spans, np.ones((count, 1), np.int64)], 1)
        units.append(whole)
    return data, np.concatenate(units)


def on_device(codec, data, units, wanted):
    labels = codec.decode_on_device(torch.from_numpy(data).to(DEVICE), units, wanted)
    assert labels.device.type == DEVICE
    return labels.to("cpu")


def assert_equal(ours, cpu):
    for field in dataclasses.fields(cpu):
        a, b = getattr(ours, field.name), getattr(cpu, field.name)
        assert torch.equal(a, b) and a.dtype == b.dtype if isinstance(b, torch.Tensor) else a == b, field.name


def outcomes(codec, *arguments):
    """The labels that the kernels give, and the CPU decoder's; None for an error."""
    found = []
    for decode in (partial(on_device, codec), codec.decode):
        try:
            found.append(decode(*arguments))
        except ValueError:
            found.append(None)
    return found


@pytest.mark.parametrize("coding", ["blocks", "rows", "plain"])
@pytest.mark.parametrize("name", CODECS)
def test_labels_are_the_cpu_decoders(name, coding):
    codec = make_codec(name, coding)
    data, units = pack(codec, (34, 3))
    wanted = np.array([36, *range(34), 2])
    assert_equal(on_device(codec, data, units, wanted), codec.decode(data, units, wanted))


@pytest.mark.parametrize("name", ["one draw", "threshold by shape", "prototype"])
def test_symbols_that_the_model_has_not_seen(name):
    codec = make_codec(name, learn_from=1)
    data, units = pack(codec, (33,))
    assert_equal(on_device(codec, data, units, np.arange(33)), codec.decode(data, units, np.arange(33)))


@pytest.mark.parametrize("coding", ["blocks", "rows", "plain"])
def test_ids_beyond_16_and_17_bits(coding):
    codec = codecs.create("sample", 2**17 + 300, [1.0], {"draws": 8, "coding": coding})
    learned(codec, codec.select(make_logits(2, codec.vocab_size), bytes(16)))
    data, units = pack(codec, (5,))
    labels = on_device(codec, data, units, np.arange(5))
    assert_equal(labels, codec.decode(data, units, np.arange(5)))
    assert int(labels.ids.max()) > 2**16


def test_no_rows_and_no_units():
    for coding in ("blocks", "rows"):
        codec, none = make_codec("prototype", coding), np.arange(0)
        data, units = pack(codec, (2,))
        assert_equal(on_device(codec, data, units, none), codec.decode(data, units, none))
        assert len(on_device(codec, data, units[:0], none)) == 0


# ---- other bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coding", ["blocks", "rows", "plain"])
@pytest.mark.parametrize("name", ["sample", "threshold", "prototype"])
def test_flipped_bits_are_the_cpu_decoders_error_or_labels(name, coding):
    codec = make_codec(name, coding)
    clean, units = pack(codec, (3,))
    draw, errors = np.random.default_rng(0), 0
    begin, length, _ = units.T
    for _ in range(12):
        data = clean.copy()
        data[draw.integers(begin[0], begin[-1] + length[-1])] ^= 1 << draw.integers(8)
        ours, cpu = outcomes(codec, data, units, np.arange(3))
        errors += cpu is None
        assert (ours is None) == (cpu is None)
        if cpu is not None:
            assert_equal(ours, cpu)
    assert errors


@pytest.mark.parametrize("coding", ["blocks", "rows", "plain"])
def test_truncated_bytes_are_an_error(coding):
    codec = make_codec("sample", coding)
    data, units = pack(codec, (2,))
    length = units[-1, 1]
    for left in {0, 1, 3, 4, 11, 12, length // 2, length - 1} - {length}:
        cut = units.copy()
        cut[-1, 1] = min(left, length - 1)
        with pytest.raises(ValueError, match=r"block (is cut short|does not end|holds)"):
            on_device(codec, data, cut, np.arange(2))


@pytest.mark.parametrize("coding", ["blocks", "rows"])
def test_noise_is_an_error_and_no_id_is_out_of_range(coding):
    draw = np.random.default_rng(1)
    codec = make_codec("threshold", coding)
    for rows in (1, 1, 2, 40):
        noise = draw.integers(0, 256, 300, np.uint8)
        noise[:4] = [20, 0, 0, 0]  # words: this gets past the first check
        units = np.array([[0, 300, rows]] if coding == "blocks" else [[7 * i, 9, 1] for i in range(rows)])
        ours, cpu = outcomes(codec, noise, units, np.arange(rows))
        assert (ours is None) == (cpu is None)
        assert ours is None or int(ours.ids.max()) < VOCAB


@pytest.mark.parametrize("unit", [[-1, 9, 1], [0, -9, 1], [0, 9, -1], [2**62, 9, 1], [92, 9, 1], [0, 2**62, 1]])
@pytest.mark.parametrize("coding", ["blocks", "rows"])
def test_units_outside_the_data_are_an_error(coding, unit):
    with pytest.raises(ValueError, match="a unit lies outside the data"):
        on_device(make_codec("prototype", coding), np.zeros(100, np.uint8), np.array([unit]), np.arange(0))


def test_rows_outside_the_units_are_an_error():
    codec = make_codec("prototype")
    data, units = pack(codec, (2,))
    with pytest.raises(IndexError, match="wanted rows 0 to 2"):
        on_device(codec, data, units, np.arange(3))


# ---- PackedLabels ---------------------------------------------------------------------------------------------------


class Pretended(torch.Tensor):
    """A CPU tensor that says it lies on a GPU."""

    is_cuda = True


def packed(codec, rows, tmp_path):
    data, units = pack(codec, rows)
    decoder = Decoder(codec, b"", tmp_path)
    on_gpu = torch.from_numpy(data).to(DEVICE).as_subclass(Pretended)
    wanted = torch.arange(sum(rows), device=DEVICE)
    return PackedLabels(on_gpu, torch.from_numpy(units).to(DEVICE), wanted, ((decoder, len(units)),))


def test_labels_on_a_gpu_are_decoded_there(tmp_path, monkeypatch):
    codec = make_codec("prototype")
    labels = PackedLabels.cat([packed(codec, (3,), tmp_path), packed(codec, (2, 2), tmp_path)])[[6, 1, 4]]
    host = labels.to("cpu")
    cpu = codec.decode(host.data.numpy(), host.units.numpy(), host.wanted.numpy())
    with monkeypatch.context() as patch:
        patch.setattr(codec, "decode", None)
        assert_equal(labels.unpack().to("cpu"), cpu)
    # Without Triton, or where rows would take too much room, as before.
    monkeypatch.setattr(entries_on_device, "MOST_SLOTS", 1)
    assert_equal(labels.unpack().to("cpu"), cpu)
    monkeypatch.setattr(entries_on_device, "kernel", lambda name: None)
    assert_equal(labels.unpack().to("cpu"), cpu)


def test_corrupt_labels_on_a_gpu_say_so(tmp_path):
    labels = packed(make_codec("prototype"), (3,), tmp_path)
    labels.data[labels.units[0, 0]] += 1
    with pytest.raises(CacheCorruptError, match="packed labels cannot be decoded: an entry block"):
        labels.unpack()
