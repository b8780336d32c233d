"""The bit layer: every row comes back, from the extension and from the plain decoder, and other bytes are an error."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdfast._C import EntryModel, RowBounds, RowLayout, count_symbols, locate_rows
from kdfast.cache.codecs.model import Statistics, id_classes, pack_statistics, unpack_statistics
from plain_decoder import decode_entry_block, decode_row, read_tables

CONTEXTS = 24 * 12 * 2


class Case:
    """Rows with random ranks below ``vocab`` and values; with ``total``, values that add up to it."""

    def __init__(self, seed, rows=40, header_fields=2, vocab=1000, most=12, total=0, largest=300):
        draw = np.random.default_rng(seed)
        counts = draw.integers(1 if total else 0, min(max(most, 1 if total else 0), vocab, total or most) + 1, rows)
        scale = draw.integers(1, vocab + 1)  # of some cases all ranks are small
        ranks = [np.sort(draw.choice(max(scale, k), k, replace=False)) for k in counts]
        values = [draw.integers(0, draw.integers(1, largest), k) for k in counts]
        if total:
            cuts = [np.sort(draw.choice(total - 1, k - 1, replace=False)) + 1 for k in counts]
            values = [np.diff(np.concatenate([[0], cut, [total]])) - 1 for cut in cuts]
        others = [draw.integers(0, 2 ** draw.integers(1, 18), rows) for _ in range(header_fields - 1)]
        self.headers = np.stack([counts, *others], 1).astype(np.int32)
        self.ranks = np.concatenate([*ranks, []]).astype(np.int32)
        self.values = np.concatenate([*values, []]).astype(np.int32)
        self.rows, self.total, self.vocab = rows, total, vocab
        self.bounds = RowBounds(
            max(most, total), [2**18] * header_fields, 2**18, np.arange(vocab, dtype=np.int32)[None]
        )

    def statistics(self, of=None):
        of = of or self
        width = of.headers.shape[1]
        return Statistics.of(count_symbols(of.headers, of.ranks, of.values, of.total), width, None)

    def model(self, of=None):
        return self.statistics(of).entry_model(self.headers.shape[1], self.total)

    def assert_is(self, headers, ids, values):
        assert np.array_equal(headers, self.headers)
        assert np.array_equal(ids, self.ranks)
        assert np.array_equal(values, self.values)


def unit(block, rows):
    return np.frombuffer(block, np.uint8), np.array([[0, len(block), rows]])


cases = st.builds(
    Case,
    seed=st.integers(0, 2**32),
    rows=st.sampled_from([1, 2, 31, 32, 33, 70]),
    header_fields=st.integers(1, 4),
    vocab=st.sampled_from([1, 2, 3, 1000, 2**16 + 1, 2**17 + 1, 2**24]),
    most=st.sampled_from([0, 1, 3, 20]),
    total=st.sampled_from([0, 0, 1, 2, 9, 50]),
)


@settings(deadline=None, max_examples=80)
@given(case=cases)
def test_entry_blocks_come_back(case):
    block = case.model().encode(case.headers, case.ranks, case.values)
    case.assert_is(*case.model().decode(*unit(block, case.rows), case.bounds))


@settings(deadline=None, max_examples=30)
@given(case=cases, other=st.integers(0, 2**32))
def test_a_model_of_other_rows_costs_bytes_and_nothing_else(case, other):
    width = case.headers.shape[1]
    model = case.model(Case(other, header_fields=width, total=case.total, vocab=7))  # most symbols are escapes
    block = model.encode(case.headers, case.ranks, case.values)
    case.assert_is(*model.decode(*unit(block, case.rows), case.bounds))


@settings(deadline=None, max_examples=25)
@given(case=cases)
def test_the_plain_decoder_agrees(case):
    width = case.headers.shape[1]
    block = case.model().encode(case.headers, case.ranks, case.values)
    tables, _ = read_tables(pack_statistics(case.statistics()), width + CONTEXTS)
    rows = decode_entry_block(block, case.rows, tables, header_fields=width, total=case.total)
    assert rows.headers == case.headers.tolist()
    entries = [entry for row in rows.entries for entry in row]
    assert entries == list(zip(case.ranks.tolist(), case.values.tolist(), strict=True))


def test_a_set_takes_fewer_bits_than_its_ids_one_by_one():
    case = Case(0, rows=4000, header_fields=1, vocab=2**12, most=16)
    case.ranks = np.concatenate(
        [np.sort(np.random.default_rng(i).choice(2**12, k, replace=False)) for i, k in enumerate(case.headers[:, 0])]
    ).astype(np.int32)
    case.values[:] = 0
    bits = 8 * len(case.model().encode(case.headers, case.ranks, case.values))
    alone = len(case.ranks) * 12 + case.rows * 4
    orders = sum(np.log2(np.arange(1, k + 1)).sum() for k in case.headers[:, 0])
    assert bits < alone - 2 / 3 * orders  # ids of one symbol keep some of theirs


@settings(deadline=None, max_examples=40)
@given(case=cases, classes=st.booleans())
def test_row_blocks_come_back_row_by_row(case, classes):
    layout = row_layout(case, classes)
    block = layout.encode(case.headers, case.ranks, case.values)
    data, whole = unit(block, case.rows)
    picked = np.arange(case.rows)[::-1].copy()
    spans = locate_rows(data, whole.repeat(case.rows, 0), picked)
    units = np.concatenate([spans, np.ones((case.rows, 1), np.int64)], 1)[::-1]
    case.assert_is(*layout.decode(data, units, case.bounds))
    options = {"header_bits": layout_bits(case), "value_bits": 18, "rank_bits": 24, "classes": classes}
    at = 0
    for row in range(case.rows):
        header, entries = decode_row(block, case.rows, row, **options)
        assert header == case.headers[row].tolist()
        end = at + len(entries)
        assert entries == list(zip(case.ranks[at:end].tolist(), case.values[at:end].tolist(), strict=True))
        at = end


def layout_bits(case):
    return [18] * case.headers.shape[1]


def row_layout(case, classes):
    return RowLayout(layout_bits(case), 18, 24, classes)


@settings(deadline=None, max_examples=150)
@given(noise=st.binary(max_size=400), rows=st.integers(1, 70), total=st.sampled_from([0, 5]), seed=st.integers(0, 9))
def test_noise_never_crashes_the_decoder(noise, rows, total, seed):
    case = Case(seed, header_fields=2, total=total)
    words = min(len(noise) // 8, 90)  # let some get past the length check
    noise = words.to_bytes(4, "little") + noise
    try:
        headers, ids, _ = case.model().decode(*unit(noise, rows), case.bounds)
    except ValueError:
        return
    assert len(headers) == rows
    assert ids.max(initial=0) < case.vocab


@settings(deadline=None, max_examples=150)
@given(seed=st.integers(0, 99), at=st.integers(0, 10**6), flip=st.integers(1, 255), total=st.sampled_from([0, 20]))
def test_a_flipped_byte_is_an_error_or_rows_within_bounds(seed, at, flip, total):
    case = Case(seed, header_fields=3, total=total)
    for coder in (case.model(), row_layout(case, True)):
        block = bytearray(coder.encode(case.headers, case.ranks, case.values))
        block[at % len(block)] ^= flip
        data, units = unit(bytes(block), case.rows)
        try:
            if isinstance(coder, RowLayout):
                spans = locate_rows(data, units.repeat(case.rows, 0), np.arange(case.rows))
                units = np.concatenate([spans, np.ones((case.rows, 1), np.int64)], 1)
            headers, ids, values = coder.decode(data, units, case.bounds)
        except ValueError:
            continue
        assert len(headers) == case.rows
        assert headers[:, 0].sum() == len(ids) == len(values)
        assert ids.min(initial=0) >= 0
        assert ids.max(initial=0) < case.vocab
        ends = headers[:, 0].cumsum()
        for row in np.split(ids, ends[:-1]):
            assert (np.diff(row) > 0).all()


def test_what_cannot_be_coded_is_refused():
    case = Case(1, rows=3, header_fields=1, most=4)
    model = case.model()
    with pytest.raises(ValueError, match="must ascend"):
        model.encode(np.array([[2]]), np.array([5, 5]), np.array([0, 0]))
    with pytest.raises(ValueError, match="add up to the number of entries"):
        model.encode(np.array([[2]]), np.array([5]), np.array([0]))
    with pytest.raises(ValueError, match=r"values must lie in \[0, 262144\), got 262144"):
        model.encode(np.array([[1]]), np.array([5]), np.array([2**18]))
    with pytest.raises(ValueError, match=r"ranks must lie in"):
        model.encode(np.array([[1]]), np.array([2**24]), np.array([0]))
    with pytest.raises(ValueError, match="do not add up to the total"):
        Case(1, header_fields=1, total=5).model().encode(np.array([[1]]), np.array([5]), np.array([3]))
    with pytest.raises(ValueError, match="cannot hold a number this large"):
        RowLayout([4], 2, 8, False).encode(np.array([[1]]), np.array([256]), np.array([0]))
    with pytest.raises(ValueError, match="sum to 4096"):
        EntryModel(1, 0, np.zeros((1 + CONTEXTS, 256), np.uint16))


def test_limits_hold_while_decoding():
    case = Case(3, rows=20, header_fields=2, most=9)
    block = case.model().encode(case.headers, case.ranks, case.values)
    order = np.arange(case.vocab, dtype=np.int32)[None]
    good = [int(case.headers[:, 0].max()), [2**18, 2**18], 2**18, order]
    for at, bad, message in [
        (0, good[0] - 1, "too many entries"),
        (1, [2**18, int(case.headers[:, 1].max())], "column exceeds"),
        (2, int(case.values.max()), "value exceeds"),
        (3, order[:, : case.ranks.max()], "outside the vocabulary"),
    ]:
        arguments = [*good[:at], bad, *good[at + 1 :]]
        with pytest.raises(ValueError, match=message):
            case.model().decode(*unit(block, case.rows), RowBounds(*arguments))
    case.assert_is(*case.model().decode(*unit(block, case.rows), RowBounds(*good)))


def test_levels_stand_for_values():
    case = Case(4, rows=50, header_fields=1, most=6, largest=9)
    levels = np.random.default_rng(0).random(int(case.values.max()) + 1, np.float32)
    order = np.random.default_rng(1).permutation(case.vocab).astype(np.int32)[None]
    limits = (6, [7], len(levels))
    block = case.model().encode(case.headers, case.ranks, case.values)
    _, ids, values = case.model().decode(*unit(block, case.rows), RowBounds(*limits, order, levels))
    assert values.dtype == np.float32
    assert np.array_equal(values, levels[case.values])
    assert np.array_equal(ids, order[0, case.ranks])
    with pytest.raises(ValueError, match=r"levels must be \(value_limit,\)"):
        RowBounds(*limits, order, levels[:-1])
    fewer = RowBounds(6, [7], len(levels) - 1, order, levels[:-1])
    with pytest.raises(ValueError, match="value exceeds"):
        case.model().decode(*unit(block, case.rows), fewer)


@pytest.mark.parametrize("vocab", [1, 300, 70_000])
def test_statistics_come_back_and_other_bytes_do_not(vocab):
    case = Case(5, header_fields=1)
    draw = np.random.default_rng(0)
    ids = draw.integers(0, vocab, 500).astype(np.int32)
    classes = id_classes(ids, draw.random(500).astype(np.float32), vocab)
    assert (classes[ids] < 31).all()
    before = case.statistics()
    packed = pack_statistics(Statistics(before.frequencies, classes))
    after = unpack_statistics(packed, 1, vocab)
    assert np.array_equal(after.frequencies, before.frequencies)
    assert np.array_equal(after.classes, classes)
    for cut in (0, 1, 5, len(packed) // 2, len(packed) - 1):
        with pytest.raises(ValueError, match=r"."):
            unpack_statistics(packed[:cut], 1, vocab)
    for at in range(0, len(packed), max(1, len(packed) // 300)):
        broken = bytearray(packed)
        broken[at] ^= 0x41
        try:
            unpack_statistics(bytes(broken), 1, vocab).entry_model(1, 0)
        except ValueError:
            continue


def test_frequencies_sum_to_4096_whatever_the_counts():
    draw = np.random.default_rng(0)
    for scale in (1, 10, 10**6):
        counts = (draw.random((1 + CONTEXTS, 256)) ** 8 * scale).astype(np.uint32)
        statistics = Statistics.of(counts, 1, None)
        assert (statistics.frequencies.sum(1) == 4096).all()
        assert (statistics.frequencies[:, 255] >= 1).all()
