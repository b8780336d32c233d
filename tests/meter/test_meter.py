"""The KL meter: unbiased, with intervals that cover, from a few draws a row; and llama.cpp's base files."""

import json
import math
import statistics
import struct
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import kdfast.cache
from kdfast.cache import codecs
from kdfast.cache.codecs.scored import STEP
from kdfast.cli.app import app
from kdfast.meter import BaseFile, compare, llama_cpp, measure, row_terms
from kdfast.meter.estimate import clustered
from kdfast.meter.models import bos_of
from support.entry_checks import learned, through_bytes

VOCAB = 64


class Table(nn.Module):
    """A model whose logits are a row per token."""

    def __init__(self, noise=0.0, seed=0):
        super().__init__()
        teacher = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1)) * 2
        own = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(2 + seed))
        self.table = nn.Parameter(teacher + noise * own)

    def forward(self, ids):
        return self.table[ids]


def exact(teacher, model, documents):
    rows = [
        (teacher.table[d.long()].double().log_softmax(1), model.table[d.long()].double().log_softmax(1))
        for d in documents
    ]
    return torch.cat([(p.exp() * (p - q)).sum(1) for p, q in rows]).detach()


def documents(count=40, length=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(VOCAB, (count, length), generator=generator))


def cache(path, docs, **options):
    teacher = Table()
    with kdfast.cache.Writer(path, vocab_size=VOCAB, codec="scored", **options) as writer:
        for ids in docs:
            writer.add(ids, teacher(ids).detach(), targets=torch.cat([ids[1:], torch.tensor([-100])]))
    return kdfast.cache.open(path)


def draw(logits, draws, key=b""):
    codec = codecs.create("scored", logits.shape[1], (1.0,), {"draws": draws})
    labels = codec.select(logits, key)
    learned(codec, labels)
    return through_bytes(codec, labels)


@pytest.mark.parametrize("noise", [0.02, 0.3, 1.0])
def test_the_mean_over_redraws_is_the_exact_kl(noise):
    redraws = 4000
    p, q = Table().table.detach(), Table(noise).table.detach()
    for row in range(4):
        kl, _ = row_terms(q[row].expand(redraws, -1), draw(p[row].expand(redraws, -1), 5))
        lp, lq = p[row].double().log_softmax(0), q[row].double().log_softmax(0)
        want = float((lp.exp() * (lp - lq)).sum())
        # What half a step of each log-probability can do to one row; over many rows its sign is random.
        rounding = STEP / 2 * float((lq.exp() - lp.exp()).abs().sum()) + STEP**2
        z = statistics.NormalDist().inv_cdf(1 - 1e-4 / 24)  # of 12 two-sided looks
        assert abs(float(kl.mean()) - want) < z * float(kl.std()) / redraws**0.5 + rounding
        assert float(kl.min()) >= 0


def test_as_many_draws_as_there_may_be_are_almost_exact():
    p, q = Table().table.detach(), Table(0.1).table.detach()
    kl, agree = row_terms(q, draw(p, 256))
    want = (p.double().softmax(1) * (p.double().log_softmax(1) - q.double().log_softmax(1))).sum(1)
    torch.testing.assert_close(kl, want, rtol=0.1, atol=1e-4)
    assert torch.equal(agree, p.argmax(1) == q.argmax(1))


def test_the_likeliest_id_is_an_entry_that_weighs_nothing_where_it_was_not_drawn():
    logits = torch.zeros(200, VOCAB)
    logits[:, 7] = 0.01
    labels = draw(logits, 2)
    row = labels.entry_rows
    first = labels.values[labels.ids == 7]
    assert len(first) == 200
    assert (first == 0).any()
    assert torch.equal(torch.zeros(200).index_add(0, row, labels.values), torch.ones(200))
    assert row_terms(logits, labels)[1].all()
    student = torch.randn(200, VOCAB, requires_grad=True)  # a student trains on the draws alone
    whole = kdfast.kd_loss(student, labels, divergence="soft_ce")
    torch.testing.assert_close(whole, kdfast.kd_loss(student, labels.without_padding(), divergence="soft_ce"))
    assert labels.without_padding().log_probs.shape == labels.without_padding().ids.shape


def test_a_model_is_measured_from_a_cache(tmp_path):
    docs = documents()
    source = cache(tmp_path, docs, draws=23)
    teacher, model = Table(), Table(0.3)
    found = measure(source, model, docs, batch_size=7)
    want = exact(teacher, model, docs)
    low, high = found.interval
    assert low < float(want.mean()) < high
    assert found.kl == pytest.approx(float(want.mean()), rel=0.1)
    ids = torch.stack(docs)
    assert found.agreement == pytest.approx(float((teacher(ids).argmax(-1) == model(ids).argmax(-1)).double().mean()))

    def loss(of):
        return nn.functional.cross_entropy(of(ids)[:, :-1].reshape(-1, VOCAB), ids[:, 1:].reshape(-1)).item()

    assert found.ce == pytest.approx(loss(model), rel=1e-5)
    assert found.perplexity_ratio == pytest.approx(math.exp(loss(model) - loss(teacher)), rel=1e-4)
    assert (found.rows, found.documents, found.exact) == (480, 40, False)
    assert measure(source, teacher, docs).kl < 1e-5
    assert measure(source, model, docs[:5]).perplexity_ratio is None  # the teacher's is that of all documents


def test_nominal_intervals_cover(tmp_path):
    """95 of 100: every trial has documents and draws of its own."""
    teacher, model = Table(), Table(0.3)
    ids = torch.arange(VOCAB)
    truth = float(exact(teacher, model, [ids]).mean())  # of uniformly drawn tokens
    covered = 0
    for trial in range(100):
        tokens = torch.stack(documents(60, 8, seed=100 + trial))
        labels = draw(teacher(tokens.reshape(-1)).detach(), 8, key=trial.to_bytes(16, "little"))
        kl, _ = row_terms(model(tokens.reshape(-1)).detach(), labels)
        mean, error = clustered(kl.numpy(), np.repeat(np.arange(60), 8))
        covered += abs(mean - truth) < 1.96 * error
    assert covered >= 93


def test_errors_are_those_of_whole_documents():
    values = np.repeat(np.arange(10.0), 50)  # the rows of a document say the same
    mean, error = clustered(values, np.repeat(np.arange(10), 50))
    assert mean == 4.5
    assert error == pytest.approx(np.std(np.arange(10.0), ddof=1) / math.sqrt(10))
    assert math.isnan(clustered(values, np.zeros(500, int))[1])


def test_one_document_has_no_error_and_its_json_is_json(tmp_path):
    docs = documents(1)
    found = measure(cache(tmp_path, docs), Table(0.3), docs)
    assert math.isnan(found.kl_error)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["kl_error"] is None


def test_models_are_ranked_with_paired_errors(tmp_path):
    docs = documents()
    source = cache(tmp_path, docs)
    models = {"far": Table(0.5), "near": Table(0.2), "nearer": Table(0.19)}
    found = compare(source, models, docs)
    assert [m.name for m in found.measurements] == ["nearer", "near", "far"]
    assert found.steps[0] is None
    apart, error = found.steps[1]
    want = exact(Table(), models["near"], docs) - exact(Table(), models["nearer"], docs)
    assert abs(apart - float(want.mean())) < 4 * error
    assert error < found.measurements[1].kl_error / 3  # far smaller than of two measurements that are not paired


@pytest.mark.parametrize("coding", ["blocks", "rows"])
def test_bytes_lose_nothing_of_what_was_selected(tmp_path, coding):
    docs = documents(6)
    source = cache(tmp_path, docs, coding=coding)
    codec = source.codec
    for ids in docs:
        want = codec.select(Table()(ids).detach(), kdfast.cache.format.keys.make_key(ids))
        found = source[ids]
        for a, b in ((found, want), (source.gather([docs[0], ids])[12:], want)):
            for row in range(len(b)):
                mine, theirs = a[row], b[row]
                at, other = mine.ids.argsort(), theirs.ids.argsort()
                assert torch.equal(mine.ids[at], theirs.ids[other])
                assert torch.equal(mine.values[at], theirs.values[other])
                assert torch.equal(mine.log_probs[at], theirs.log_probs[other])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 0}, r"draws must lie in \[1, 256\], got 0"),
        ({"draws": 257}, "got 257"),
        ({"coding": "plain"}, 'coding must be "blocks" or "rows"'),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        codecs.create("scored", VOCAB, (1.0,), options)


@pytest.mark.parametrize("moved", [3e-4, -1e-4, math.nan, -math.inf, -40.0])
def test_log_probabilities_off_the_grid_are_not_rounded_in_silence(moved):
    codec = codecs.create("scored", VOCAB, (1.0,), {"draws": 5})
    labels = codec.select(Table().table.detach(), b"")
    learned(codec, labels)
    with pytest.raises(ValueError, match="a log-probability is not one that this codec gives"):
        codec.encode(replace(labels, log_probs=labels.log_probs + moved))


def test_what_cannot_be_measured_is_named(tmp_path):
    docs = documents(3)
    source = cache(tmp_path / "a", docs)
    with pytest.raises(ValueError, match="a cache is measured on documents"):
        measure(source, Table())
    with pytest.raises(KeyError):
        measure(source, Table(), documents(1, seed=9))
    with pytest.raises(ValueError, match=r"logits must be \(36, 64\), got \(36, 63\)"):
        measure(source, lambda ids: Table()(ids)[..., :63], docs)
    with kdfast.cache.Writer(tmp_path / "b", vocab_size=VOCAB, codec="sample", draws=5) as writer:
        writer.add(docs[0], Table()(docs[0]).detach())
    with pytest.raises(ValueError, match="3 of 36 rows of model have a KL of NaN, the first in document 1"):
        measure(source, lambda ids: Table()(ids).masked_fill((ids == docs[1][4])[..., None], math.nan), docs)
    warm = cache(tmp_path / "c", docs, temperatures=[2.0])
    with pytest.raises(ValueError, match="of temperature 2, and the KL is measured at temperature 1"):
        measure(warm, Table(), docs)
    with pytest.raises(ValueError, match='capture with codec="scored"'):
        measure(kdfast.cache.open(tmp_path / "b"), Table(), docs[:1])


# ---- llama.cpp ------------------------------------------------------------------------------------------------------


def write_base(path, teacher, chunks, context=12, cut=0):
    """As llama-perplexity does: the rows of each chunk's second half, spread over 16 nats at most."""
    first = context // 2
    data = b"_logits_" + struct.pack("<3I", context, VOCAB, len(chunks))
    data += torch.stack(chunks).numpy().astype("<i4").tobytes()
    for ids in chunks:
        for logits in teacher(ids)[first:-1].detach().numpy():
            top, low = logits.max(), max(logits.min(), logits.max() - 16)
            scale = np.float32((top - low) / 65535)
            smallest = np.float32(low - top - np.log(np.exp(logits - top).sum()))
            levels = np.rint((logits.clip(low) - low) / scale).astype("<u2")
            data += scale.tobytes() + smallest.tobytes() + levels.tobytes() + b"\0\0" * (VOCAB % 2)
    path.write_bytes(data[: len(data) - cut])
    return path


def test_a_base_file_is_measured_exactly(tmp_path, monkeypatch):
    chunks = documents(5)
    base = BaseFile(write_base(tmp_path / "base.kld", Table(), chunks))
    assert (base.context, base.vocab_size, len(base), base.rows_per_chunk) == (12, VOCAB, 5, 5)
    model = Table(0.3)
    found = measure(base, model)
    want = exact(Table(), model, [ids[6:-1] for ids in chunks])
    assert found.kl == pytest.approx(float(want.mean()), rel=1e-3)
    assert found.exact
    ids = torch.stack(chunks)
    ce = nn.functional.cross_entropy(Table()(ids)[:, 6:-1].reshape(-1, VOCAB), ids[:, 7:].reshape(-1)).item()
    assert base.cross_entropy == pytest.approx(ce, rel=1e-4)
    assert found.perplexity_ratio == pytest.approx(math.exp(found.ce - ce), rel=1e-4)
    reads = []
    monkeypatch.setattr(BaseFile, "log_probs", lambda self, chunk: reads.append(chunk))
    assert BaseFile(base.path).cross_entropy == pytest.approx(ce, rel=1e-4)
    assert not reads  # of whole rows
    monkeypatch.undo()
    with pytest.raises(ValueError, match="a base file has documents of its own"):
        measure(base, model, chunks)
    with pytest.raises(ValueError, match="12 tokens and 64 columns, the model gave"):
        measure(base, lambda ids: Table()(ids)[..., :9])


class Remembering(Table):
    """Its logits depend on the first token."""

    def forward(self, ids):
        return super().forward(ids) + super().forward(ids[:, :1])


@pytest.mark.parametrize("said", ["by the model", "by the caller", "by nobody"])
def test_chunks_are_run_with_bos_where_the_file_begins_with_it(tmp_path, said):
    chunks, bos = documents(4), 3
    chunks[0][0] = bos
    stored = [torch.cat([torch.tensor([bos]), ids[1:]]) for ids in chunks]
    path = write_base(tmp_path / "base.kld", lambda ids: Remembering()(ids[None])[0], stored)
    data = bytearray(path.read_bytes())  # the file has the tokens of the text
    data[20 : 20 + 4 * 48] = torch.stack(chunks).numpy().astype("<i4").tobytes()
    path.write_bytes(data)
    model = Remembering()
    if said == "by the model":
        model.config = types.SimpleNamespace(bos_token_id=bos)
    found = measure(BaseFile(path, bos=bos if said == "by the caller" else None), model)
    assert (found.kl < 1e-5) == (said != "by nobody")


def test_files_that_are_none_are_named(tmp_path):
    path = tmp_path / "base.kld"
    path.write_bytes(b"_logits")
    with pytest.raises(kdfast.cache.CacheError, match="does not begin with _logits_"):
        BaseFile(path)
    path.write_bytes(b"_logits_" + struct.pack("<3I", 2**31, 2**31, 2**31))
    with pytest.raises(kdfast.cache.CacheError, match="claims"):
        BaseFile(path)
    path.write_bytes(b"_logits_" + struct.pack("<3I", 2**31, 2**20, 2**31))  # nothing of that size is allocated
    with pytest.raises(kdfast.cache.CacheError, match="it was cut short"):
        BaseFile(path)
    with pytest.raises(kdfast.cache.CacheError, match="it was cut short"):
        BaseFile(write_base(path, Table(), documents(2), cut=1))
    data = bytearray(write_base(path, Table(), documents(2)).read_bytes())
    data[20:24] = (VOCAB).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(kdfast.cache.CacheError, match="has tokens 0 to 64, and 64 columns"):
        BaseFile(path)


def test_gguf_models_are_run_by_llama_cpp(monkeypatch):
    class Llama:
        def __init__(self, model_path, n_ctx, logits_all, verbose):
            assert (model_path, n_ctx, logits_all, verbose) == ("a.gguf", 16, True, False)
            self.scores = np.zeros((n_ctx, VOCAB), np.float32)

        def token_bos(self):
            return 1

        def reset(self):
            self.scores[:] = np.nan

        def eval(self, tokens):
            self.scores[: len(tokens)] = Table()(torch.tensor(tokens)).detach().numpy()

    monkeypatch.setitem(sys.modules, "llama_cpp", types.SimpleNamespace(Llama=Llama))
    model = llama_cpp("a.gguf", context=16)
    ids = torch.stack(documents(3))
    torch.testing.assert_close(model(ids), Table()(ids).detach())
    assert bos_of(model) == 1
    with pytest.raises(ValueError, match="a document of 17 tokens, and context=16"):
        model(torch.zeros(1, 17, dtype=torch.long))
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ImportError, match="pip install llama-cpp-python"):
        llama_cpp("a.gguf")


def test_the_command(tmp_path, monkeypatch):
    base = write_base(tmp_path / "base.kld", Table(), documents(5))
    noise = {"q8": 0.05, "q4": 0.4}
    monkeypatch.setattr("kdfast.cli.kld.load_causal_model", lambda name, dtype: Table(noise[name]))
    result = CliRunner().invoke(app, ["kld", str(base), "q4", "q8", "--json", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    assert "25 rows of 5 documents; exact KL of each row" in result.output
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in rows] == ["q8", "q4"]
    assert rows[1]["from_the_one_before"]["difference"] == pytest.approx(rows[1]["kl"] - rows[0]["kl"])
    result = CliRunner().invoke(app, ["kld", str(tmp_path / "none"), "q4"])
    assert result.exit_code == 1
    cache(tmp_path / "cache", documents(2))
    result = CliRunner().invoke(app, ["kld", str(tmp_path / "cache"), "q4"])
    assert "--text FILE" in result.output
