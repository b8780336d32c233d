"""Labels from hidden states: what is stored, whose head it needs, and how far off the gradients are."""

import pickle

import numpy as np
import pytest
import torch

import kdfast.cache
from kdfast import Head, OutputLayer, SoftLabels
from kdfast.cache import CacheMismatchError, codecs
from kdfast.testing import loss_and_gradient

VOCAB, WIDTH, ROWS = 50, 16, 12


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


WEIGHT, BIAS = random(VOCAB, WIDTH, seed=1) / 3, random(VOCAB, seed=2)
HEAD = OutputLayer(WEIGHT, BIAS)
HIDDEN = random(ROWS, WIDTH, seed=3) * torch.logspace(-2, 1, ROWS)[:, None]


def codec(bits=16, head=HEAD):
    return codecs.create("hidden", VOCAB, (1.0,), {"width": WIDTH, "head": head.fingerprint, "bits": bits})


def decode(made, block, rows=ROWS):
    return made.decode(np.frombuffer(block, np.uint8), np.array([[0, len(block), rows]]), np.arange(rows))


def roundtrip(made, hidden):
    return decode(made, made.encode(made.select(hidden, b"")), len(hidden)).values


def test_16_bits_are_a_bfloat16_teacher_s_own():
    hidden = HIDDEN.bfloat16()
    assert torch.equal(roundtrip(codec(), hidden), hidden)
    assert torch.equal(roundtrip(codec(), HIDDEN), hidden)
    assert codec().row_bytes == 2 * WIDTH


def test_8_bits_are_within_half_a_step():
    got = roundtrip(codec(8), HIDDEN)
    step = (HIDDEN.abs().amax(1, keepdim=True) / 127).bfloat16().float()
    assert (got - HIDDEN).abs().div(step).max() <= 0.5 + 1e-6
    assert (got - HIDDEN).abs().div(step).max() > 0.4
    assert codec(8).row_bytes == WIDTH + 2


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-37, 1.0, 1e37])
def test_encoding_loses_nothing_that_select_kept(bits, scale):
    made = codec(bits)
    labels = made.select(HIDDEN * scale, b"")
    block = made.encode(labels)
    assert torch.equal(decode(made, block).values.float(), labels.values.float())
    assert made.encode(decode(made, block)) == block


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "logit_mse"])
def test_gradients_are_those_of_float64_logits_within_the_promised_error(bits, temperature, divergence):
    head = OutputLayer(WEIGHT, BIAS, scale=0.5, softcap=20.0)
    student = random(ROWS, VOCAB, seed=4)
    hidden = roundtrip(codec(bits, head), HIDDEN)
    exact = (HIDDEN.double() @ WEIGHT.double().T + BIAS.double()) * 0.5
    exact = 20.0 * (exact / 20.0).tanh()
    largest = HIDDEN.double().abs().amax(1)
    off = largest / 127 * 0.502 if bits == 8 else largest * 2**-8
    bound = 0.5 * off * WEIGHT.double().abs().sum(1).max() + 1e-5  # of a logit, per row; the softcap only shrinks it
    logits = SoftLabels.hidden(hidden, head).to_dense().values
    assert ((logits - exact).abs().amax(1) <= bound).all()
    options = {"divergence": divergence, "temperature": temperature, "reduction": "sum"}
    _, got = loss_and_gradient(student, SoftLabels.hidden(hidden, head), **options)
    _, want = loss_and_gradient(student.double(), exact, **options)
    # Forward KL: |dp_j| <= (exp(2 bound / T) - 1) p_j; the others have a teacher's probability or logit as a factor.
    allowed = 2 * temperature * (2 * bound / temperature).expm1() + bound
    assert ((got - want).abs().amax(1) <= allowed).all()


def write(path, head=HEAD, **options):
    options = {"codec": "hidden", "width": WIDTH, "head": head.fingerprint, **options}
    with kdfast.cache.Writer(path, vocab_size=VOCAB, **options) as writer:
        for key in range(4):
            writer.add(key, HIDDEN[key : key + 3])


def test_a_cache_opened_with_its_head_serves_a_loss(tmp_path):
    write(tmp_path)
    for head in (HEAD, (WEIGHT, BIAS)):
        labels = kdfast.cache.open(tmp_path, head=head).gather([2, 0])
        assert (labels.kind, len(labels), labels.vocab_size) == ("hidden", 6, VOCAB)
        expected = torch.cat([HIDDEN[2:5], HIDDEN[:3]]).bfloat16().float() @ WEIGHT.T + BIAS
        torch.testing.assert_close(labels[1:].to_dense().values, expected[1:])
        student = random(6, VOCAB, seed=5)
        got, want = (loss_and_gradient(student, x, divergence="reverse_kl")[1] for x in (labels, expected))
        torch.testing.assert_close(got, want)


def test_a_pickled_reader_keeps_its_head(tmp_path):
    write(tmp_path)
    again = pickle.loads(pickle.dumps(kdfast.cache.open(tmp_path, head=HEAD)))
    torch.testing.assert_close(again[0].to_dense().values, HEAD.logits(HIDDEN[:3].bfloat16()))


def test_another_head_is_refused(tmp_path):
    write(tmp_path)
    for other in ((WEIGHT, None), (WEIGHT, BIAS + 1e-7), (WEIGHT.double(), BIAS), OutputLayer(WEIGHT, BIAS, scale=2.0)):
        with pytest.raises(CacheMismatchError, match=f"{HEAD.fingerprint}, but the head given is"):
            kdfast.cache.open(tmp_path, head=other)
    assert kdfast.cache.head_fingerprint(WEIGHT, BIAS) == HEAD.fingerprint
    assert kdfast.cache.head_fingerprint(WEIGHT.T.contiguous().T, BIAS) == HEAD.fingerprint


def test_a_head_for_labels_that_need_none(tmp_path):
    with kdfast.cache.Writer(tmp_path, vocab_size=VOCAB, codec="topk") as writer:
        writer.add(0, random(1, VOCAB))
    with pytest.raises(CacheMismatchError, match="its codec is topk, which takes no head"):
        kdfast.cache.open(tmp_path, head=HEAD)


def test_without_its_head_a_cache_can_be_looked_into_but_not_trained_from(tmp_path):
    write(tmp_path)
    cache = kdfast.cache.open(tmp_path)
    cache.verify()
    with pytest.raises(ValueError, match=r"need the teacher's output layer: kdfast.cache.open\(path, head=...\)"):
        kdfast.kd_loss(random(3, VOCAB), cache[0])


def test_the_writer_wants_hidden_states(tmp_path, request):
    made = kdfast.cache.Writer(tmp_path, vocab_size=VOCAB, codec="hidden", width=WIDTH, head=HEAD.fingerprint)
    request.addfinalizer(made.close)
    with pytest.raises(ValueError, match=rf"hidden states must be \(rows, {WIDTH}\) .* got \(3, {VOCAB}\)"):
        made.add(0, random(3, VOCAB))
    bad = HIDDEN[:3].clone()
    bad[1, 0] = -torch.inf
    with pytest.raises(ValueError, match="row 1 has a hidden state that is infinite"):
        made.add(0, bad)
    with pytest.raises(ValueError, match=r"row 2 has a hidden state that is .* beyond bfloat16"):
        made.add(0, torch.tensor([[1.0], [2.0], [-3.4e38]]).expand(3, WIDTH))


@pytest.mark.parametrize(
    ("bits", "block", "message"),
    [
        (16, b"\0" * 3, "1 rows of 4 bytes expected"),
        (16, b"\x80\x7f\0\0", "a hidden state is infinite or NaN"),
        (8, b"\x80\x7f\1\1", "step is negative, infinite or NaN"),
        (8, b"\0\x80\1\1", "step is negative, infinite or NaN"),
        (8, b"\x80\x3f\1\x80", "a value's code is -128"),
    ],
)
def test_decoding_other_bytes_is_an_error(bits, block, message):
    made = codecs.create("hidden", 5, (1.0,), {"width": 2, "head": "0" * 32, "bits": bits})
    with pytest.raises(ValueError, match=message):
        decode(made, block, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OutputLayer(WEIGHT[0]), r"weight must be floating-point \(vocab, d\)"),
        (lambda: OutputLayer(WEIGHT, BIAS[1:]), r"bias must be \(50,\), got \(49,\)"),
        (lambda: OutputLayer(WEIGHT, softcap=0.0), "scale and softcap must be positive"),
        (lambda: HEAD.logits(HIDDEN[:, 1:]), r"hidden states must be \(..., 16\) for this head, got \(12, 15\)"),
        (lambda: HEAD.logits(HIDDEN.to("meta")), "hidden states are on meta, the head on cpu"),
        (lambda: OutputLayer(WEIGHT.to("meta")).fingerprint, "weight is on the meta device"),
        (lambda: SoftLabels.hidden(HIDDEN), "need head or vocab_size"),
        (lambda: SoftLabels.hidden(HIDDEN, HEAD, vocab_size=51), "do not fit a head of width 16 and vocab_size 50"),
        (lambda: SoftLabels.hidden(HIDDEN[0], HEAD), r"floating-point \(rows, d\), got"),
        (
            lambda: SoftLabels.cat([SoftLabels.hidden(HIDDEN, h) for h in (HEAD, OutputLayer(WEIGHT))]),
            "not the same obj",
        ),
        (
            lambda: SoftLabels.weights(torch.zeros(1, 1).long(), torch.ones(1, 1), vocab_size=3).to_dense(),
            "dense and hidden",
        ),
        (lambda: codecs.create("hidden", 5, (1.0,), {"width": 2, "head": "me"}), "32 hexadecimal digits, got 'me'"),
        (lambda: codecs.create("hidden", 5, (1.0,), {"width": 0, "head": "0" * 32}), "width must be at least 1"),
        (lambda: codecs.create("hidden", 5, (1.0,), {"width": 2, "head": "0" * 32, "bits": 4}), "bits must be 8 or 16"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_head_is_the_layer_with_its_input():
    head = Head(HIDDEN[None], WEIGHT, BIAS, scale=2.0, softcap=5.0)
    expected = 5.0 * torch.tanh(2.0 * (HIDDEN @ WEIGHT.T + BIAS) / 5.0)
    torch.testing.assert_close(head.logits(), expected[None])


def test_labels_with_their_head_survive_a_failing_writer(tmp_path):
    """What is in no block yet goes to the journal, which takes no output layer: the reader gives it."""
    labels = SoftLabels.hidden(HIDDEN.bfloat16(), HEAD)
    options = {"vocab_size": VOCAB, "codec": "hidden", "width": WIDTH, "head": HEAD.fingerprint, "teacher": "t"}
    writer = kdfast.cache.Writer(tmp_path, **options)
    writer.add_labels("a", labels)
    writer.__exit__(RuntimeError, RuntimeError("stopped"), None)
    with kdfast.cache.Writer(tmp_path, **options) as writer:
        writer.add_labels("b", labels)
    cache = kdfast.cache.open(tmp_path, head=HEAD)
    assert torch.equal(cache["a"].values.bfloat16(), labels.values)
    assert torch.equal(cache["b"].values, cache["a"].values)
