"""The codecs: what they keep, exactly, and how far off the rest is."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdfast._C import check_codes, first_bad_top
from kdfast.cache import codecs
from kdfast.testing import loss_and_gradient
from support.caches import Toy

TEMPERATURES = (0.5, 1.0, 2.0, 7.0)


def decode(codec, block, rows, wanted=None):
    unit = np.array([[0, len(block), rows]])
    return codec.decode(np.frombuffer(block, np.uint8), unit, np.arange(rows) if wanted is None else np.array(wanted))


def roundtrip(codec, logits):
    return decode(codec, codec.encode(codec.select(logits, b"\0" * 16)), len(logits))


def topk(vocab_size, temperatures=(1.0,), **options):
    return codecs.create("topk", vocab_size, temperatures, options)


def entries(labels, row):
    span = slice(*labels.offsets[row : row + 2].tolist())
    return labels.ids[span].tolist(), labels.values[span].tolist()


def true_tail(row, left_out, temperature):
    """log of the softmax mass of the columns ``left_out``, by summing just those."""
    largest = max(row)
    mass = [math.exp((z - largest) / temperature) for z in row]
    rest = math.fsum(mass[j] for j in left_out)
    return math.log(rest) - math.log(math.fsum(mass)) if rest else -math.inf


@st.composite
def masked_logits(draw):
    vocab, rows = draw(st.integers(1, 40)), draw(st.integers(0, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * draw(st.sampled_from([0.0, 1, 8]))
    masked = torch.rand(rows, vocab, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.95]))
    masked[:, draw(st.integers(0, vocab - 1))] = False
    return logits.masked_fill(masked, -math.inf)


@settings(deadline=None, max_examples=60)
@given(logits=masked_logits(), k=st.integers(1, 48), value_dtype=st.sampled_from(["float16", "float32"]))
def test_topk_keeps_the_largest_and_the_exact_tail(logits, k, value_dtype):
    labels = roundtrip(topk(logits.shape[1], TEMPERATURES, k=k, value_dtype=value_dtype), logits)
    assert len(labels) == len(logits)
    for i, row in enumerate(logits):
        ids, values = entries(labels, i)
        finite = int(row.isfinite().sum())
        assert len(set(ids)) == len(ids) == min(k, finite)
        assert sorted(row[ids].tolist()) == sorted(row.tolist())[len(row) - len(ids) :]
        relative = 2**-11 if value_dtype == "float16" else 2**-24
        np.testing.assert_allclose(values, row.log_softmax(0)[ids], rtol=relative * 1.01, atol=6e-8)
        left_out = set(range(len(row))) - set(ids)
        expected = [true_tail(row.tolist(), left_out, t) for t in TEMPERATURES]
        np.testing.assert_allclose(labels.tails[:, i], expected, rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("gap", [10.0, 25.0, 60.0])
def test_tiny_tails_keep_their_digits(gap):
    # log1p(-sum of the entries) has no correct digit left from a gap of about 35.
    row = torch.tensor([0.0, -1.0, -gap, -gap - 1.0], dtype=torch.float64)
    labels = roundtrip(topk(4, (1.0, 2.0), k=2), row[None])
    for t, tail in zip((1.0, 2.0), labels.tails[:, 0].tolist(), strict=True):
        assert tail == pytest.approx(true_tail(row.tolist(), {2, 3}, t), rel=1e-7)


@pytest.mark.parametrize("vocab_size", [65536, 65537, 131073, 151936, 262144])
def test_ids_up_to_the_end_of_any_vocabulary(vocab_size):
    logits = torch.zeros(2, vocab_size)
    wanted = [[vocab_size - 1, 65000, 0], [vocab_size - 2, 255, 256]]
    for row, ids in enumerate(wanted):
        logits[row, ids] = torch.tensor([30.0, 20.0, 10.0])
    codec = topk(vocab_size, k=3)
    labels = roundtrip(codec, logits)
    assert [entries(labels, row)[0] for row in (0, 1)] == wanted
    assert codec.row_bytes == 3 * (2 if vocab_size <= 65536 else 3) + 3 * 2 + 4


def test_a_log_probability_too_small_for_its_type_stays_in_the_tail():
    row = torch.tensor([[0.0, -1.0, -1e5, -math.inf]], dtype=torch.float64)
    labels = roundtrip(topk(4, (1.0, 1e5), k=4), row)
    assert entries(labels, 0)[0] == [0, 1]
    assert labels.tails[1, 0].item() == pytest.approx(true_tail(row[0].tolist(), {2}, 1e5), rel=1e-6)
    assert entries(roundtrip(topk(4, k=4, value_dtype="float32"), row), 0)[0] == [0, 1, 2]


@pytest.mark.parametrize("at", [0, 130, 299])
@pytest.mark.parametrize("lead", [90.0, 130.0, 400.0, 2000.0])
def test_entries_and_tails_behind_a_lead_that_exponentials_do_not_reach(lead, at):
    torch.manual_seed(int(lead))
    logits = torch.randn(3, 300) * 10 - lead
    logits[:, at] = 0.0
    labels = roundtrip(topk(300, (1.0, 50.0), k=5, value_dtype="float32"), logits)
    student = torch.randn(3, 300, dtype=torch.float64)
    for i, row in enumerate(logits):
        assert sorted(entries(labels, i)[0]) == sorted(row.topk(5).indices.tolist())
    for t in (1.0, 50.0):
        loss, _ = loss_and_gradient(student, labels, temperature=t)
        p, lq = (logits.double() / t).log_softmax(1), (student / t).log_softmax(1)
        ids = logits.topk(5).indices
        classes = [
            torch.cat([x.gather(1, ids), x.scatter(1, ids, -math.inf).logsumexp(1)[:, None]], 1) for x in (p, lq)
        ]
        truth = t**2 * (classes[0].exp() * (classes[0] - classes[1])).sum(1).mean()
        assert loss.item() == pytest.approx(truth.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["topk", "dense"])
def test_rows_wanted_from_the_middle_of_a_block(name):
    codec = codecs.create(name, 9, (1.0, 3.0), {})
    logits = torch.randn(8, 9, generator=torch.Generator().manual_seed(0))
    whole = roundtrip(codec, logits)
    part = decode(codec, codec.encode(codec.select(logits, b"")), 8, [3, 4, 5])
    for field in ("values", "ids", "tails", "offsets"):
        ours, theirs = getattr(part, field), getattr(whole[3:6], field)
        assert ours is theirs is None or torch.equal(ours, theirs)


@settings(deadline=None, max_examples=60)
@given(logits=masked_logits())
def test_dense_is_within_its_step(logits):
    labels = roundtrip(codecs.create("dense", logits.shape[1], (1.0,), {}), logits)
    expected = logits.log_softmax(1)
    assert torch.equal(labels.values.isfinite(), expected.isfinite())
    for got, want in zip(labels.values, expected, strict=True):
        finite = want.isfinite()
        step = (want[finite].max() - want[finite].min()) / 254
        assert (got[finite] - want[finite]).abs().max() <= step + 1e-5
        assert got.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_dense_uses_all_codes_and_keeps_the_mask():
    logits = torch.cat([-torch.arange(255.0) / 10, torch.tensor([-math.inf])])
    block = codecs.create("dense", 256, (1.0,), {})
    packed = np.frombuffer(block.encode(block.select(logits[None], b"")), np.uint8)
    assert packed[4:].tolist() == list(range(256))


def test_dense_refuses_a_row_it_cannot_hold():
    logits = torch.zeros(3, 4)
    logits[1, 2] = -1e9
    with pytest.raises(ValueError, match=r"row 1 spans 1e\+09 nats.* masked columns must be -inf"):
        codecs.create("dense", 4, (1.0,), {}).select(logits, b"")
    assert len(roundtrip(codecs.create("dense", 4, (1.0,), {"max_error": 1e7}), logits)) == 3


@pytest.mark.parametrize("name", ["topk", "dense"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_type_and_layout_of_logits(name, dtype):
    logits = (torch.randn(12, 5, generator=torch.Generator().manual_seed(1)) * 3).to(dtype).T.requires_grad_()
    codec = codecs.create(name, 12, (1.0, 2.0), {"k": 5} if name == "topk" else {})
    got = codec.select(logits, b"")
    assert not got.values.requires_grad
    assert codec.encode(got) == codec.encode(codec.select(logits.detach().contiguous(), b""))
    exact = codec.select(logits.detach().double(), b"")
    assert torch.equal(got.values.half(), exact.values.half())
    if name == "topk":  # whose masses of narrow logits are summed in float32
        assert torch.equal(got.ids, exact.ids)
        assert torch.allclose(got.tails, exact.tails, rtol=0, atol=5e-7)


@pytest.mark.parametrize(
    ("name", "block", "message"),
    [
        ("topk", bytes(7), "1 rows of 12 bytes expected, found 7 bytes"),
        ("topk", b"\xff" * 4 + bytes(8), "id 65535 is outside the vocabulary of 5"),
        ("topk", bytes(4) + b"\xff" * 2 + bytes(6), r"a log-probability or a tail is not in \[-inf, 0\]"),
        ("topk", bytes(8) + b"\xff" * 4, "a log-probability or a tail is not in"),
        ("dense", bytes(8), "1 rows of 9 bytes expected, found 8 bytes"),
        ("dense", b"\0\0\xc0\x7f" + bytes(5), "step is outside"),
        ("dense", b"\0\0\0\xbf" + bytes(5), "step is outside"),
        ("dense", bytes(4) + b"\xff" * 5, "no finite column"),
    ],
)
def test_decoding_other_bytes_is_an_error(name, block, message):
    codec = codecs.create(name, 5, (1.0,), {"k": 2} if name == "topk" else {})
    with pytest.raises(ValueError, match=message):
        decode(codec, block, 1)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(["topk", "dense"]), st.binary(max_size=64), st.integers(0, 4))
def test_decoding_noise_never_crashes(name, block, rows):
    codec = codecs.create(name, 70000 if name == "topk" else 8, (1.0,), {"k": 2} if name == "topk" else {})
    try:
        labels = decode(codec, block, rows)
    except ValueError:
        return
    assert len(labels) == rows


@pytest.mark.parametrize(("name", "options"), [("topk", {"k": 3, "value_dtype": "float32"}), ("dense", {})])
def test_a_codec_is_rebuilt_from_its_config(name, options):
    codec = codecs.create(name, 10, (1.0, 2.0), options)
    again = codecs.create(codec.name, codec.vocab_size, codec.temperatures, codec.config())
    assert (again.config(), again.row_dtype) == (codec.config(), codec.row_dtype)
    assert options.items() <= codec.config().items()


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (("zip", 5, (1.0,), {}), ValueError, r"codec must be one of \[.*'dense', .*'topk'.*got 'zip'"),
        (("top_k", 5, (1.0,), {}), ValueError, r"got 'top_k': did you mean topk\?"),
        (("prototpe", 5, (1.0,), {}), ValueError, r"got 'prototpe': did you mean prototype\?"),
        ((3, 5, (1.0,), {}), ValueError, "codec must be one of .* got 3"),
        (("topk", 5, (1.0,), {"kk": 3}), TypeError, "codec 'topk' has no option kk: did you mean k"),
        (("topk", 5, (1.0,), {"top_k": 3}), TypeError, r"codec 'topk' has no option top_k: did you mean k\?"),
        (("sample", 5, (1.0,), {"num_samples": 3}), TypeError, r"did you mean draws\?"),
        (("topk", 5, (1.0,), {"k": 0}), ValueError, "codec 'topk': k must be at least 1, got 0"),
        (("topk", 5, (1.0,), {"k": 2.5}), TypeError, "codec 'topk'.*float"),
        (("topk", 5, (1.0,), {"value_dtype": "int8"}), ValueError, "value_dtype must be one of .* got 'int8'"),
        (("topk", 0, (1.0,), {}), ValueError, "vocab_size must lie in .* got 0"),
        (("dense", 2**24 + 1, (1.0,), {}), ValueError, "vocab_size must lie in .* got 16777217"),
        (("topk", 5, (), {}), ValueError, r"temperatures must be positive and finite, got \(\)"),
        (("topk", 5, (1.0, 0.0), {}), ValueError, "temperatures must be positive and finite"),
        (("dense", 5, (math.nan,), {}), ValueError, "temperatures must be positive and finite"),
        (("dense", 5, (1.0,), {"max_error": math.nan}), ValueError, "max_error must be positive, got nan"),
    ],
)
def test_bad_options_are_named(args, error, message):
    with pytest.raises(error, match=message):
        codecs.create(*args)


def test_a_name_is_registered_once():
    class Impostor(codecs.TopK):
        pass

    with pytest.raises(ValueError, match="'topk' is already registered: TopK"):
        codecs.register(Impostor)
    assert codecs.register(codecs.TopK) is codecs.TopK is codecs.find("topk")
    assert {"dense", "hard", "hidden", "prototype", "sample", "threshold", "topk"} <= set(codecs.names())
    with pytest.raises(AttributeError, match=r"module 'kdfast.cache.codecs' has no attribute 'Nothing'"):
        _ = codecs.Nothing


@settings(deadline=None, max_examples=60)
@given(logits=masked_logits())
def test_4_bits_are_within_their_step(logits):
    codec = codecs.create("dense", logits.shape[1], (1.0,), {"bits": 4, "max_error": 100.0})
    labels = roundtrip(codec, logits)
    assert codec.row_bytes == 4 + (logits.shape[1] + 1) // 2
    expected = logits.log_softmax(1)
    assert torch.equal(labels.values.isfinite(), expected.isfinite())
    for got, want in zip(labels.values, expected, strict=True):
        finite = want.isfinite()
        step = (want[finite].max() - want[finite].min()) * (1 - (13 / 14) ** 1.5)
        error = (got[finite] - want[finite]).abs()
        assert error.max() <= step + 1e-5
        assert got.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_4_bits_use_all_codes_and_keep_the_mask():
    logits = torch.cat([-(torch.arange(15.0) ** 1.5), torch.tensor([-math.inf, -0.4])])
    codec = codecs.create("dense", 17, (1.0,), {"bits": 4, "max_error": 10.0})
    block = codec.encode(codec.select(logits[None], b""))
    assert block[4:] == bytes([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE, 0x00])
    assert codec.encode(decode(codec, block, 1)) == block


def test_4_bits_refuse_a_row_that_spans_too_much():
    logits = torch.tensor([[0.0, -37.0], [0.0, -39.0]])
    codec = codecs.create("dense", 2, (1.0,), {"bits": 4})
    assert codec.max_error == 4.0
    with pytest.raises(ValueError, match=r"row 1 spans 39 nats, so that 4 bits are off by up to 4\.1"):
        codec.select(logits, b"")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dense_gradients_are_within_the_promised_error(bits, temperature):
    generator = torch.Generator().manual_seed(5)
    teacher, student = (torch.randn(16, 40, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    labels = roundtrip(codecs.create("dense", 40, (1.0,), {"bits": bits}), teacher)
    log_probs = teacher.log_softmax(1)
    relative = 1 / 254 if bits == 8 else 1 - (13 / 14) ** 1.5
    step = (log_probs.amax(1) - log_probs.amin(1)) * relative
    _, got = loss_and_gradient(student, labels, temperature=temperature, reduction="sum")
    _, want = loss_and_gradient(student, teacher, temperature=temperature, reduction="sum")
    # The gradient is T (q - p), and a log-probability off by at most step / T.
    p = (teacher / temperature).softmax(1)
    allowed = temperature * p * (2 * step / temperature).expm1()[:, None] + 1e-6
    assert ((got - want).abs() <= allowed).all()


def test_old_caches_have_a_config_without_bits():
    assert codecs.create("dense", 5, (1.0,), {"max_error": 0.5}).config() == {"max_error": 0.5}
    assert codecs.create("dense", 5, (1.0,), {"bits": 4}).config() == {"bits": 4, "max_error": 4.0}


@pytest.mark.parametrize("vocab_size", [5, 65537])
def test_hard_labels_are_the_first_argmax(vocab_size):
    logits = torch.full((4, vocab_size), -math.inf)
    logits[0, 2:4] = 1.0
    logits[1, vocab_size - 1] = -5.0
    logits[2, 1], logits[2, 0] = 3.0, 2.0
    logits[3, 0] = 0.0
    codec = codecs.create("hard", vocab_size, (1.0, 4.0), {})
    labels = roundtrip(codec, logits)
    assert labels.ids.tolist() == [2, vocab_size - 1, 1, 0]
    assert codec.row_bytes == (2 if vocab_size < 65536 else 3)
    student = torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(0))
    for temperature in (1.0, 4.0):
        for divergence in ("forward_kl", "soft_ce"):
            options = {"divergence": divergence, "temperature": temperature, "scale_by_t2": False}
            loss, grad = loss_and_gradient(student, labels, **options)
            exact = (student.double() / temperature).requires_grad_()
            expected = torch.nn.functional.cross_entropy(exact, labels.ids.long())
            expected.backward()
            torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(grad.double(), exact.grad / temperature, rtol=1e-5, atol=1e-7)


def test_bytes_that_4_bits_and_hard_labels_never_write():
    with pytest.raises(ValueError, match="the half byte after a row's last code is not 0"):
        decode(codecs.create("dense", 3, (1.0,), {"bits": 4}), bytes(5) + b"\x10", 1)
    with pytest.raises(ValueError, match="no finite column"):
        decode(codecs.create("dense", 3, (1.0,), {"bits": 4}), bytes(4) + b"\xff\x0f", 1)
    with pytest.raises(ValueError, match="id 5 is outside the vocabulary of 5"):
        decode(codecs.create("hard", 5, (1.0,), {}), b"\5\0", 1)
    with pytest.raises(ValueError, match=r"bits must be one of \[4, 8\], got 16"):
        codecs.create("dense", 3, (1.0,), {"bits": 16})


def test_former_option_names_are_the_library_s_own():
    class Shaped(Toy):
        name = "shaped toy"

        def __init__(self, vocab_size, temperatures, shapes=0):
            super().__init__(vocab_size, temperatures)
            self.shapes = shapes

    codecs.register(Shaped)
    assert codecs.create("shaped toy", 5, (1.0,), {"shapes": 3}).shapes == 3
    assert codecs.current_options("prototype", {"shapes": 3, "k": 1}) == {"prototypes": 3, "k": 1}
    assert codecs.current_options("auto", {"shapes": 3}) == {"prototypes": 3}


# ---- what the native checks say --------------------------------------------------------------------------------------


def test_one_look_at_codes_tells_bad_rows_and_masks():
    codes = np.array([[0, 14, 3], [3, 0, 14], [15, 0, 14], [0, 1, 2]], np.uint8)
    spread = np.array([True, True, True, True])
    assert check_codes(codes[:2], 14, spread[:2]) == (-1, False)
    assert check_codes(codes[:3], 14, spread[:3]) == (-1, True)
    assert check_codes(codes, 14, spread) == (3, True)
    assert check_codes(codes, 14, ~spread) == (-1, True)
    assert check_codes(codes[:0], 14, spread[:0]) == (-1, False)


def test_rows_of_top_entries_have_an_entry_and_a_vocabulary():
    ids, values = np.zeros((2, 1), np.int32), np.zeros((2, 1), np.float32)
    assert first_bad_top(ids, values, 1) == -1
    for rows, vocab in ((ids[:, :0], 1), (ids, 0)):
        with pytest.raises(ValueError, match="k and vocab must be positive"):
            first_bad_top(rows, values[:, : rows.shape[1]], vocab)


@pytest.mark.parametrize("count", [3, 4096, 2**13])
def test_ids_of_a_row_that_differ_are_told_from_two_that_do_not(count):
    """Whatever places they share in the tables that tell most rows at once."""
    ids = np.arange(0, 8 * count, 8, dtype=np.int32)[None]
    values = np.zeros(ids.shape, np.float32)
    assert first_bad_top(ids, values, 8 * count) == -1
    ids[0, -1] = ids[0, 1]
    assert first_bad_top(ids, values, 8 * count) == 0


@pytest.mark.parametrize("value_dtype", ["float16", "float32"])
@pytest.mark.parametrize("rows", [1, 5])
def test_full_rows_of_top_entries_are_no_view_of_the_bytes(value_dtype, rows):
    codec = codecs.create("topk", 9, (1.0,), {"k": 3, "value_dtype": value_dtype})
    packed = np.frombuffer(bytearray(codec.encode(codec.select(torch.randn(rows, 9), bytes(16)))), codec.row_dtype)
    labels = codec.unpack(packed)
    values, ids = labels.values.clone(), labels.ids.clone()
    packed["values"], packed["ids"] = -9, 1
    assert labels.width == 3
    assert torch.equal(labels.values, values)
    assert torch.equal(labels.ids, ids)
    assert labels.offsets.tolist() == list(range(0, 3 * rows + 1, 3))
