"""Importing other tools' labels: files written here in their documented layouts come out as what was written."""

import io
import json
import math
import tarfile

import numpy as np
import pytest
import torch
from safetensors import safe_open

import kdfast
import kdfast.cache
from kdfast.cache.convert import BiasReport, DistillKit, Megatron, TopKLogProbs, import_records

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

VOCAB = 1000


def teacher(rows, seed=0, vocab=VOCAB):
    """(rows, vocab) log-probabilities, and the ids of a text it predicts: each next token is the row's most likely."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = (torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * 3).log_softmax(1)
    ids = torch.cat([torch.tensor([seed % vocab]), log_probs.argmax(1)])
    return log_probs, ids


def assert_rows(labels, ids, values, tolerance=0.0):
    """``labels`` hold the entries (rows, k), largest first, and the tail that they leave."""
    values = torch.as_tensor(np.asarray(values), dtype=torch.float64)
    order = values.sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(labels.ids.view(values.shape).long(), torch.as_tensor(np.asarray(ids)).gather(1, order))
    torch.testing.assert_close(
        labels.values.view(values.shape).double(), values.gather(1, order), rtol=tolerance, atol=tolerance
    )
    expected = torch.log1p(-values.exp().sum(1))
    torch.testing.assert_close(labels.tails[0].double(), expected, rtol=1e-6, atol=max(tolerance, 1e-6))


# ---- DistillKit ---------------------------------------------------------------------------------------------------

CONFIG = {
    "d": VOCAB,
    "k": 12,
    "exact_k": 4,
    "exact_dtype": "bfloat16",
    "polynomial_terms": [0, 1, "sqrt"],
    "term_dtype": "float32",
    "residual_bins": [],
    "delta_encoding": False,
    "error_diffusion": False,
}


def pack_bits(numbers, bits):
    """Most significant bit first, padded to a byte."""
    text = "".join(format(int(n), f"0{bits}b") for n in numbers)
    text += "0" * (-len(text) % 8)
    return [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]


def floats(values, dtype):
    """The bytes of ``values``, and what they stand for."""
    held = torch.tensor(np.asarray(values, np.float64)).to(getattr(torch, dtype))
    return held.view(torch.uint8).tolist(), held.double().numpy()


def distillkit_row(log_probs, config):
    """(bytes, values that they stand for) of one row of k log-probabilities, largest first."""
    values = np.diff(log_probs, prepend=0.0) if config["delta_encoding"] else log_probs
    data, exact = floats(values[: config["exact_k"]], config["exact_dtype"])
    rest = values[config["exact_k"] :]
    t = np.linspace(0, 1, len(rest)) if config.get("normalize_t") else np.arange(len(rest), dtype=float)
    stands = np.zeros(len(rest))
    terms = config["polynomial_terms"]
    if terms:
        basis = np.stack([t**term if isinstance(term, int) else getattr(np, term)(t) for term in terms], 1)
        more, coefficients = floats(np.linalg.lstsq(basis, rest, rcond=None)[0], config["term_dtype"])
        data, stands = data + more, basis @ coefficients
    at = 0
    for part in config["residual_bins"]:
        bits, count = part["element_bits"], part["num_elements"]
        residuals = (rest - stands)[at : at + count]
        more, scale = floats([np.abs(residuals).max() / (2 ** (bits - 1) if bits > 1 else 1)], part["scale_dtype"])
        low = -(2 ** (bits - 1)) if bits > 1 else 0
        codes = (np.round(residuals / scale) if bits > 1 else residuals > 0).clip(low, low + 2**bits - 1) - low
        data = data + more + pack_bits(codes, bits)
        stands[at : at + count] += ((2 * codes - 1) if bits == 1 else codes + low) * scale
        at += count
    stood = np.concatenate([exact, stands])
    return data, stood.cumsum() if config["delta_encoding"] else stood


def write_distillkit(folder, config, samples=2, rows=5, extra=False):
    """Two files of one sample each or so. Returns the ids, and per sample the entries that the bytes stand for."""
    folder.mkdir()
    (folder / "compression_config.yaml").write_text(json.dumps(config))  # JSON is YAML
    schema = pa.schema(
        [
            ("input_ids", pa.list_(pa.uint64())),
            ("compressed_logprobs", pa.list_(pa.list_(pa.uint8()))),
            ("bytepacked_indices", pa.list_(pa.list_(pa.uint8()))),
        ]
    )
    texts, expected = [], []
    for number in range(samples):
        log_probs, ids = teacher(rows, seed=number, vocab=config["d"])
        top = log_probs.topk(config["k"], 1)
        packed = [distillkit_row(row.numpy(), config) for row in top.values]
        bits = math.ceil(math.log2(config["d"]))
        ids = ids if not extra else ids[:rows]
        table = pa.table(
            {
                "input_ids": [ids.tolist()],
                "compressed_logprobs": [[data for data, _ in packed]],
                "bytepacked_indices": [[pack_bits(row, bits) for row in top.indices]],
            },
            schema=schema,
        )
        pq.write_table(table, folder / f"data_{number}.parquet")
        texts.append(ids)
        expected.append((top.indices, np.stack([stood for _, stood in packed])))
    return texts, expected


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"d": 70_000, "exact_dtype": "float32"},
        {"exact_k": 12, "polynomial_terms": None, "exact_dtype": "float16"},
        {"exact_k": 0, "polynomial_terms": [0, 1, 2, 3, "sqrt"]},
        {"delta_encoding": True, "exact_dtype": "float32"},
        {"normalize_t": True, "polynomial_terms": [0, 2, "exp"], "term_dtype": "float64"},
        {"residual_bins": [{"scale_dtype": "float16", "element_bits": 5, "num_elements": 3}]},
        {
            "polynomial_terms": [],
            "residual_bins": [
                {"scale_dtype": "float32", "element_bits": 8, "num_elements": 5},
                {"scale_dtype": "bfloat16", "element_bits": 11, "num_elements": 3},
            ],
        },
        {"residual_bins": [{"scale_dtype": "float32", "element_bits": 1, "num_elements": 8}]},
    ],
)
def test_distillkit_rows_come_out_as_their_bytes_say(tmp_path, change):
    config = {**CONFIG, **change}
    texts, expected = write_distillkit(tmp_path / "capture", config)
    report = import_records(DistillKit(tmp_path / "capture"), tmp_path / "cache", vocab_size=config["d"], tolerance=0.5)
    cache = kdfast.cache.open(tmp_path / "cache")
    assert (cache.info.codec, cache.info.config["k"], report.records, report.rows) == ("topk", 12, 2, 10)
    for ids, (entries, values) in zip(texts, expected, strict=True):
        labels = cache[ids]
        order = (-values).argsort(1, kind="stable")
        np.testing.assert_array_equal(labels.ids.view(5, 12), np.take_along_axis(entries.numpy(), order, 1))
        expected_values = np.take_along_axis(values, order, 1).clip(max=0)
        np.testing.assert_allclose(labels.values.view(5, 12), expected_values, rtol=3e-7, atol=1e-6)


def test_distillkit_exact_values_stay_exact(tmp_path):
    config = {**CONFIG, "exact_k": 12, "polynomial_terms": None, "exact_dtype": "float16"}
    (ids, *_), ((entries, values), *_) = write_distillkit(tmp_path / "capture", config)
    import_records(DistillKit(tmp_path / "capture"), tmp_path / "cache", vocab_size=VOCAB)
    cache = kdfast.cache.open(tmp_path / "cache")
    assert cache.info.config["value_dtype"] == "float16"
    assert_rows(cache[ids], entries, values)


def test_distillkit_with_a_row_for_the_last_token(tmp_path):
    (ids, *_), _ = write_distillkit(tmp_path / "capture", CONFIG, extra=True)
    report = import_records(DistillKit(tmp_path / "capture"), tmp_path / "cache", vocab_size=VOCAB)
    assert len(kdfast.cache.open(tmp_path / "cache")[ids]) == len(ids) == 5
    assert report.missing_targets == 0


def test_distillkit_single_file_and_training_config(tmp_path):
    (ids, _), _ = write_distillkit(tmp_path / "capture", CONFIG)
    config = tmp_path / "train.yaml"
    config.write_text("model: x\nteacher:\n  kind: dataset\n  logprob_compressor: " + json.dumps(CONFIG))
    source = DistillKit(tmp_path / "capture" / "data_0.parquet", config)
    assert (source.k, source.size) == (12, 1)
    import_records(source, tmp_path / "cache", vocab_size=VOCAB)
    assert list(kdfast.cache.open(tmp_path / "cache")) == [kdfast.cache.format.keys.make_key(ids)]


def test_distillkit_legacy_columns(tmp_path):
    config = {"vocab_size": VOCAB, "k": 10, "exact_k": 4, "polynomial_degree": 2, "with_sqrt_term": True}
    log_probs, ids = teacher(3)
    top = log_probs.topk(10, 1)
    a = np.arange(1, 7.0)
    basis = np.stack([a**0, a**-1, a**-2, np.sqrt(a)], 1)
    coefficients = np.linalg.lstsq(basis, top.values[:, 4:].T.numpy(), rcond=None)[0].T.astype(np.float32)
    words = [[sum(int(n) << (10 * i) for i, n in enumerate(row[at : at + 6])) for at in (0, 6)] for row in top.indices]
    exact = top.values[:, :4].numpy().astype(np.float16)
    table = pa.table(
        {
            "input_ids": pa.array([ids.tolist()], pa.list_(pa.uint64())),
            "packed_indices": pa.array([words], pa.list_(pa.list_(pa.uint64()))),
            "exact_values": pa.array([exact.astype(np.float32).tolist()], pa.list_(pa.list_(pa.float32()))),
            "coeffs": pa.array([coefficients.tolist()], pa.list_(pa.list_(pa.float32()))),
        }
    )
    pq.write_table(table, tmp_path / "legacy.parquet")
    (tmp_path / "c.json").write_text(json.dumps({"legacy_logit_compression": config}))
    import_records(DistillKit(tmp_path / "legacy.parquet", tmp_path / "c.json"), tmp_path / "cache", vocab_size=VOCAB)
    labels = kdfast.cache.open(tmp_path / "cache")[ids]
    values = np.concatenate([exact.astype(np.float64), coefficients.astype(np.float64) @ basis.T], 1)
    assert_rows(labels, top.indices, values, tolerance=1e-6)


def test_distillkit_faults_are_named(tmp_path):
    write_distillkit(tmp_path / "capture", CONFIG)
    (tmp_path / "bad.yaml").write_text("k: 3")
    (tmp_path / "other.json").write_text(json.dumps({**CONFIG, "exact_k": 5}))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.parquet").write_text("text")
    pq.write_table(pa.table({"input_ids": [[1]]}), tmp_path / "columns.parquet")
    cases = [
        (tmp_path / "capture", tmp_path / "none.yaml", r"none.yaml: is not there"),
        (tmp_path / "capture", tmp_path / "bad.yaml", r"bad.yaml: is not a DistillKit compression config"),
        (tmp_path / "empty", None, "empty: holds no Parquet file"),
        (tmp_path / "text.parquet", tmp_path / "other.json", "text.parquet: is not a readable Parquet file"),
        (tmp_path / "columns.parquet", tmp_path / "other.json", "lacks the columns .*compressed_logprobs"),
        (tmp_path / "capture", tmp_path / "other.json", r"data_0.parquet: sample 0: .* row 0 has 20 numbers .* has 22"),
    ]
    for path, config, message in cases:
        with pytest.raises(kdfast.cache.CacheError, match=message):
            import_records(DistillKit(path, config), tmp_path / "cache", vocab_size=VOCAB)


# ---- top-k log-probabilities --------------------------------------------------------------------------------------


def vllm(log_probs, k=6):
    """Each row's k most likely ids and their log-probabilities, as pairs."""
    top = log_probs.topk(k, 1)
    return [list(zip(i.tolist(), v.tolist(), strict=True)) for i, v in zip(top.indices, top.values, strict=True)]


FORMS = {
    "digits": lambda pairs: {str(i): v for i, v in pairs},
    "vllm": lambda pairs: {str(i): {"logprob": v, "rank": 1, "decoded_token": "x"} for i, v in pairs},
    "prefixed": lambda pairs: [{f"token_id:{i}": v} for i, v in pairs],
    "axolotl": lambda pairs: [{"token": f"token_id:{i}", "logprob": v} for i, v in pairs],
}


def write_lines(path, samples):
    path.write_text("\n".join(json.dumps(sample) for sample in samples) + "\n")
    return path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("alignment", ["position", "next"])
def test_log_probs_in_every_form(tmp_path, form, alignment):
    log_probs, ids = teacher(5)
    rows = [FORMS[form](pairs) for pairs in vllm(log_probs)]
    elements = [None, *rows] if alignment == "position" else rows
    path = write_lines(tmp_path / "x.jsonl", [{"input_ids": ids.tolist(), "logprobs": elements}])
    report = import_records(TopKLogProbs(path, alignment), tmp_path / "cache", vocab_size=VOCAB)
    labels = kdfast.cache.open(tmp_path / "cache")[ids]
    top = log_probs.topk(6, 1)
    assert_rows(labels, top.indices, top.values.float())
    assert report.missing_targets == 0
    assert report.misaligned is None


@pytest.mark.parametrize("last", [None, "row"])
def test_next_may_or_may_not_have_a_row_for_the_last_token(tmp_path, last):
    log_probs, ids = teacher(4)
    rows = [FORMS["digits"](pairs) for pairs in vllm(log_probs)]
    ids = ids[:4] if last else ids
    sample = {"input_ids": ids.tolist(), "logprobs": rows if last else [*rows, None]}
    import_records(
        TopKLogProbs(write_lines(tmp_path / "x.jsonl", [sample]), "next"), tmp_path / "cache", vocab_size=VOCAB
    )
    assert len(kdfast.cache.open(tmp_path / "cache")[ids]) == 4


def test_log_probs_in_parquet_with_separate_ids(tmp_path):
    log_probs, ids = teacher(4)
    top = log_probs.topk(3, 1)
    table = pa.table(
        {
            "input_ids": [ids[:4].tolist()],
            "logprobs": [top.values.tolist()],
            "target_token_ids": [top.indices.tolist()],
            "messages": ["text"],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    import_records(TopKLogProbs(tmp_path / "x.parquet", "next"), tmp_path / "cache", vocab_size=VOCAB)
    assert_rows(kdfast.cache.open(tmp_path / "cache")[ids[:4]], top.indices, top.values.float())


def test_ragged_rows_keep_what_they_have(tmp_path):
    rows = [{"1": -0.5}, {"2": -1.0, "3": -1.5, "4": -2.0}]
    path = write_lines(tmp_path / "x.jsonl", [{"input_ids": [1, 2], "logprobs": rows}])
    import_records(TopKLogProbs(path, "next"), tmp_path / "cache", vocab_size=VOCAB)
    labels = kdfast.cache.open(tmp_path / "cache")[torch.tensor([1, 2])]
    assert labels.offsets.tolist() == [0, 1, 4]
    assert labels.tails[0].tolist() == pytest.approx([math.log1p(-sum(map(math.exp, r.values()))) for r in rows])


ROW = {"5": -1.0}


@pytest.mark.parametrize(
    ("elements", "alignment", "message"),
    [
        ([None, ROW, ROW], None, "alignment must be 'position' .* or 'next' .*got None"),
        ([None, ROW, ROW], "next", "sample 1: its first logprobs element is null.* is it alignment 'position'"),
        ([ROW, ROW, ROW], "position", "sample 1: its first logprobs element is not null.* is it alignment 'next'"),
        ([None, ROW], "position", "2 logprobs for 3 input_ids; alignment 'position' wants as many"),
        ([ROW], "next", "1 logprobs for 3 input_ids; alignment 'next' wants as many or one fewer"),
        ([ROW, None, ROW], "next", "element 1 of logprobs is null"),
        ([None, ROW, {}], "position", "element 2 of logprobs is null or empty"),
        ([None, ROW, {"the": -1.0}], "position", "'the' is not a token's id"),
        ([None, ROW, [-1.0]], "position", "must name its token"),
        ([None, None, None], "position", "element 1 of logprobs is null"),
    ],
)
def test_a_wrong_alignment_never_shifts(tmp_path, elements, alignment, message):
    path = write_lines(tmp_path / "x.jsonl", [{"input_ids": [1, 2, 3], "logprobs": elements}])
    with pytest.raises(kdfast.cache.CacheError, match=message):
        TopKLogProbs(path, alignment)


def test_lines_that_are_no_samples_are_named(tmp_path):
    for text, message in [
        ("{", "line 1 is not JSON"),
        ('{"input_ids": []}', "line 1 lacks"),
        ("", "holds no log-prob"),
    ]:
        (tmp_path / "x.jsonl").write_text(text)
        with pytest.raises(kdfast.cache.CacheError, match=message):
            TopKLogProbs(tmp_path / "x.jsonl", "next")


# ---- Megatron -----------------------------------------------------------------------------------------------------


def write_megatron(folder, iterations=2, ranks=2, samples=2, rows=4, k=5, vocab=100_000, dtype="fp16", nucleus=False):
    """Tars as the run would leave them, and the tokens file. Returns {place: (ids, entries, values)}."""
    folder.mkdir()
    written, lines = {}, []
    for rank in range(ranks):
        with tarfile.open(folder / f"cp0_dp{rank}__{iterations}.tar", "w") as tar:

            def add(name, data, tar=tar):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

            add("_meta.json", json.dumps({"hash": "x", "saver": {"k": k, "save_dtype": dtype}}).encode())
            for iteration in range(1, iterations + 1):
                payload = {"values": [], "indices_low": [], "bit_17": []}
                for microbatch in range(2):
                    rows_of = []
                    for sample in range(samples):
                        seed = len(written)
                        log_probs, ids = teacher(rows, seed, vocab)
                        top = log_probs.topk(k, 1)
                        values = top.values.to({"fp16": torch.float16, "bf16": torch.bfloat16}[dtype])
                        indices = top.indices.clone()
                        if nucleus:  # the last two entries of row 1 lie outside it
                            values[1, -2:], indices[1, -2:] = -1e4, -1
                        place = (iteration, rank, microbatch, sample)
                        written[place] = (ids[:rows], indices, values)
                        names = zip(("iteration", "dp", "microbatch", "sample"), place, strict=True)
                        lines.append({**dict(names), "input_ids": ids[:rows].tolist()})
                        rows_of.append((values, indices))
                    values, indices = (torch.stack(part, 1) for part in zip(*rows_of, strict=True))
                    payload["values"].append(values)
                    payload["indices_low"].append((indices & 0xFFFF).to(torch.uint16))
                    payload["bit_17"].append((indices >> 16).bool())
                buffer = io.BytesIO()
                torch.save(payload, buffer)
                add(f"{iteration}.pt.zst", zstandard.ZstdCompressor(3).compress(buffer.getvalue()))
    write_lines(folder / "tokens.jsonl", lines)
    return written


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_megatron_samples_find_their_tokens(tmp_path, dtype):
    written = write_megatron(tmp_path / "run", dtype=dtype)
    source = Megatron(tmp_path / "run", tmp_path / "run" / "tokens.jsonl")
    report = import_records(source, tmp_path / "cache", vocab_size=100_000)
    cache = kdfast.cache.open(tmp_path / "cache")
    assert len(cache) == report.records == source.size == len(written) == 16
    assert cache.info.config == {"k": 5, "value_dtype": "float16" if dtype == "fp16" else "float32"}
    assert max(int(entries.max()) for _, entries, _ in written.values()) > 65536
    for ids, entries, values in written.values():
        assert_rows(cache[ids], entries, values.double())
    assert report.missing_targets == 0


def test_megatron_nucleus_padding_is_not_an_entry(tmp_path):
    written = write_megatron(tmp_path / "run", nucleus=True)
    import_records(Megatron(tmp_path / "run", tmp_path / "run" / "tokens.jsonl"), tmp_path / "cache", vocab_size=10**5)
    ids, _, values = written[1, 0, 0, 0]
    labels = kdfast.cache.open(tmp_path / "cache")[ids]
    assert labels.offsets.diff().tolist() == [5, 3, 5, 5]
    assert labels.tails[0, 1].item() == pytest.approx(math.log1p(-float(values[1, :3].double().exp().sum())), rel=1e-6)


def test_megatron_faults_are_named(tmp_path, monkeypatch):
    write_megatron(tmp_path / "run", iterations=1, ranks=1)
    run, tokens = tmp_path / "run", tmp_path / "run" / "tokens.jsonl"
    lines = tokens.read_text().splitlines()

    def attempt(text):
        tokens.write_text("\n".join(text) + "\n")
        import_records(Megatron(run, tokens), tmp_path / "cache", vocab_size=10**5)

    with pytest.raises(kdfast.cache.CacheError, match=r"iteration 1, microbatch 1, sample 1: .*has no tokens for it"):
        attempt(lines[:-1])
    short = json.dumps({**json.loads(lines[0]), "input_ids": [1]})
    with pytest.raises(kdfast.cache.CacheError, match="microbatch 0, sample 0: has 4 rows, but its tokens are 1"):
        attempt([short, *lines[1:]])
    with pytest.raises(kdfast.cache.CacheError, match="lines 1 and 2 are of one sample"):
        attempt([lines[0], *lines])
    with pytest.raises(kdfast.cache.CacheError, match="line 1 is not a sample's tokens"):
        attempt(["{}"])
    (run / "cp1_dp0__1.tar").write_bytes(b"")
    with pytest.raises(kdfast.cache.CacheError, match="context parallelism"):
        attempt(lines)
    (run / "cp1_dp0__1.tar").unlink()
    (run / "cp0_dp0__1.tar").write_bytes(b"not a tar file" * 100)
    with pytest.raises(kdfast.cache.CacheCorruptError, match="is not a readable tar file"):
        attempt(lines)
    (run / "cp0_dp0__1.tar").unlink()
    with pytest.raises(kdfast.cache.CacheError, match="holds no cp<rank>"):
        attempt(lines)
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(kdfast.cache.CacheError, match="needs the package zstandard: pip install zstandard"):
        attempt(lines)


class Malice:
    def __reduce__(self):
        return (print, ("executed",))


def test_megatron_payloads_cannot_run_code(tmp_path, capsys):
    write_megatron(tmp_path / "run", iterations=1, ranks=1)
    buffer = io.BytesIO()
    torch.save({"values": Malice()}, buffer)
    data = zstandard.ZstdCompressor().compress(buffer.getvalue())
    with tarfile.open(tmp_path / "run" / "cp0_dp0__1.tar", "a") as tar:
        info = tarfile.TarInfo("2.pt.zst")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    source = Megatron(tmp_path / "run", tmp_path / "run" / "tokens.jsonl")
    with pytest.raises(kdfast.cache.CacheCorruptError, match="iteration 2: is not what Megatron-Core writes"):
        list(source)
    assert "executed" not in capsys.readouterr().out


# ---- what every import does ---------------------------------------------------------------------------------------


def lines_of(tmp_path, *samples):
    """Samples of two rows each, given as {id: probability}."""
    written = [
        {"input_ids": [n, 7, 8], "logprobs": [{str(i): math.log(p) for i, p in row.items()} for row in rows]}
        for n, rows in enumerate(samples)
    ]
    return TopKLogProbs(write_lines(tmp_path / "x.jsonl", written), "next")


FINE = {7: 0.5, 8: 0.25}


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({7: 0.7, 8: 0.4}, "probabilities add up to 1.1, where at most 1.01"),
        ({7: 1.2}, "a log-probability of 0.182"),
        ({VOCAB: 0.5}, "id 1000 is outside the vocabulary of 1000"),
    ],
)
def test_broken_rows_are_refused_or_dropped_with_their_record(tmp_path, row, fault):
    source = lines_of(tmp_path, [FINE, FINE], [FINE, row])
    with pytest.raises(kdfast.cache.CacheError, match=f"x.jsonl: sample 2: row 1: {fault}"):
        import_records(source, tmp_path / "cache", vocab_size=VOCAB)
    report = import_records(source, tmp_path / "other", vocab_size=VOCAB, drop_broken=True)
    assert (report.records, len(report.dropped)) == (1, 1)
    assert fault in report.dropped[0]
    assert "1 records were left out" in report.lines()[-1]
    assert list(kdfast.cache.open(tmp_path / "other")) == [kdfast.cache.format.keys.make_key(np.array([0, 7, 8]))]


@pytest.mark.parametrize(
    ("entries", "fault"),
    [
        ([[7, -1.0], [7, -2.0]], "id 7 occurs twice"),
        ([[7, math.nan]], "a log-probability of nan"),
        ([[7, -math.inf]], "no entry"),
        ([[-1, -1.0]], "id -1 is outside"),
    ],
)
def test_other_broken_rows(tmp_path, entries, fault):
    sample = {
        "input_ids": [1, 2],
        "logprobs": [[value for _, value in entries]],
        "target_token_ids": [[token for token, _ in entries]],
    }
    source = TopKLogProbs(write_lines(tmp_path / "x.jsonl", [sample]), "next")
    with pytest.raises(kdfast.cache.CacheError, match=f"row 0: {fault}"):
        import_records(source, tmp_path / "cache", vocab_size=VOCAB)


def test_rounding_above_one_is_stored_without_a_tail_and_counted(tmp_path):
    source = lines_of(tmp_path, [{7: 0.75, 8: 0.252}, {8: 1.001}])
    report = import_records(source, tmp_path / "cache", vocab_size=VOCAB)
    labels = kdfast.cache.open(tmp_path / "cache")[np.array([0, 7, 8])]
    assert labels.tails[0].tolist() == [-math.inf, -math.inf]
    assert labels.values.max() == 0
    assert report.above_one == 1  # the second row's entry is capped at 1
    assert "add up to slightly more than 1" in "\n".join(report.lines())


def test_fewer_entries_go_to_the_tail(tmp_path):
    source = lines_of(tmp_path, [{7: 0.5, 8: 0.25, 9: 0.125}, {8: 0.5}])
    import_records(source, tmp_path / "cache", vocab_size=VOCAB, k=2)
    labels = kdfast.cache.open(tmp_path / "cache")[np.array([0, 7, 8])]
    assert labels.ids.tolist() == [7, 8, 8]
    assert labels.tails[0].exp().tolist() == pytest.approx([0.25, 0.5])
    with pytest.raises(kdfast.cache.CacheError, match=r"k=4 entries are wanted, but .* has at most 3"):
        import_records(source, tmp_path / "more", vocab_size=VOCAB, k=4)
    with pytest.raises(kdfast.cache.CacheError, match="not as dense"):
        import_records(source, tmp_path / "more", vocab_size=VOCAB, codec="dense")
    assert not (tmp_path / "more").exists()


def test_values_too_small_for_float16_join_the_tail(tmp_path):
    sample = {"input_ids": [1, 2], "logprobs": [{"3": -0.5, "4": -1e5}]}
    source = TopKLogProbs(write_lines(tmp_path / "x.jsonl", [sample]), "next")
    import_records(source, tmp_path / "cache", vocab_size=VOCAB, value_dtype="float16")
    assert kdfast.cache.open(tmp_path / "cache")[np.array([1, 2])].ids.tolist() == [3]


def test_the_report_says_what_is_left_out(tmp_path):
    source = lines_of(tmp_path, [{7: 0.5, 9: 0.25}, {8: 0.5}], [{7: 0.5}, {9: 0.5}])
    report = import_records(source, tmp_path / "cache", vocab_size=VOCAB)
    assert (report.rows, report.entries) == (4, 5)
    assert report.mean_mass == pytest.approx((0.75 + 0.5 + 0.5 + 0.5) / 4)
    assert report.median_mass == pytest.approx(0.5, abs=1e-4)
    assert report.mean_scale == pytest.approx((1 / 0.75 + 2 + 2 + 2) / 4)
    assert (report.targets, report.missing_targets) == (2, 0)  # one row per sample has neighbours on both sides
    text = "\n".join(report.lines())
    for expected in ("56.25%", "43.75%", "1.83 times", "missing from the entries of 0.00%"):
        assert expected in text
    assert "WARNING" not in text


def test_a_shifted_corpus_is_noticed(tmp_path):
    log_probs, ids = teacher(40)
    rows = [FORMS["digits"](pairs) for pairs in vllm(log_probs, 2)]
    path = write_lines(tmp_path / "x.jsonl", [{"input_ids": ids[1:].tolist(), "logprobs": rows}])
    report = import_records(TopKLogProbs(path, "next"), tmp_path / "cache", vocab_size=VOCAB)
    assert report.misaligned == -1
    assert any("WARNING" in line and "1 earlier" in line for line in report.lines())


def test_the_tokens_after_the_rows_are_marked_as_targets(tmp_path):
    import_records(lines_of(tmp_path, [FINE, FINE]), tmp_path / "cache", vocab_size=VOCAB)
    (path,) = (tmp_path / "cache").glob("shard-*")
    with safe_open(path, "np") as shard:
        found = shard.get_tensor("record_targets").tolist()
    assert found == [kdfast._C.crc32c(np.array([7, 8], "<u4"))]


def test_an_import_can_be_run_again(tmp_path):
    source = lines_of(tmp_path, [FINE, FINE], [FINE, FINE])
    import_records(source, tmp_path / "cache", vocab_size=VOCAB)
    again = import_records(source, tmp_path / "cache", vocab_size=VOCAB)
    assert (again.records, again.duplicates) == (0, 2)
    assert len(kdfast.cache.open(tmp_path / "cache")) == 2
    with pytest.raises(kdfast.cache.CacheMismatchError, match="teacher='u'"):
        import_records(source, tmp_path / "cache", vocab_size=VOCAB, teacher="u")


def test_an_empty_report_has_words():
    assert BiasReport().lines() == ["0 records, 0 rows, 0.0 entries per row"]
