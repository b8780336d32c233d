"""capture: what is run, what is stored under which key, and what a second run makes of it."""

import functools
import multiprocessing
import pickle
import random
import re
import signal

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import kdfast.cache
from kdfast import _progress
from kdfast.cache import CacheMismatchError, View, capture, codecs, replica_key
from kdfast.cache.capture import capture as capture_module
from kdfast.cache.capture import stream as stream_module
from kdfast.cache.codecs.auto import FAR_KL, LARGE_VOCAB, SMALL_VOCAB
from kdfast.divergences import DIVERGENCES
from kdfast.labels import SoftLabels
from kdfast.labels.support import SERVES
from support.caches import contents
from support.children import CAPTURE_BATCHES, CAPTURES, capture_and_tell, capture_until_killed

VOCAB, LENGTH = 9, 5


class Teacher(nn.Module):
    """Causal, and of padding no notion: embeddings, a running mean, dropout."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.embed, self.drop, self.head = nn.Embedding(VOCAB, 8), nn.Dropout(0.5), nn.Linear(8, VOCAB)
        self.calls = 0

    def forward(self, input_ids, attention_mask=None):
        self.calls += 1
        assert not torch.is_grad_enabled()
        x = self.embed(input_ids).cumsum(1) / torch.arange(1, input_ids.shape[1] + 1)[:, None]
        return self.head(self.drop(x))


@pytest.fixture
def teacher():
    return Teacher()


def batches(count=6, size=3):
    """Right-padded batches of random ids."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        ids = torch.randint(1, VOCAB, (size, LENGTH), generator=generator)
        lengths = torch.randint(3, LENGTH + 1, (size, 1), generator=generator)
        yield {"input_ids": ids, "attention_mask": (torch.arange(LENGTH) < lengths).long()}


def records():
    for batch in batches():
        for ids, real in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            yield ids[real]


run = functools.partial(capture, vocab_size=VOCAB, codec="dense", progress=False)


def files(path):
    return {file.name: file.read_bytes() for file in path.iterdir() if file.suffix == ".safetensors"}


def test_records_are_the_teacher_s_rows_by_their_unpadded_ids(tmp_path, teacher):
    report = run(teacher, batches(), tmp_path)
    cache = kdfast.cache.open(tmp_path)
    everything = list(records())
    assert report == (6, 0, len(everything), sum(map(len, everything)))
    assert len(cache) == len(everything)
    teacher.eval()
    for ids in everything:
        with torch.no_grad():
            expected = teacher(ids[None])[0].log_softmax(1)
        step = (expected.amax(1) - expected.amin(1)) / 254
        assert ((cache[ids].values - expected).abs().amax(1) <= step + 1e-5).all()


class Stopped(Exception):
    pass


def stopping(count):
    for number, batch in enumerate(batches()):
        if number == count:
            raise Stopped
        yield batch


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("sizes", [{}, {"shard_bytes": 60, "block_rows": 1}, {"shard_bytes": 200, "block_rows": 4}])
def test_a_resumed_capture_leaves_the_files_of_an_uninterrupted_one(tmp_path, teacher, count, sizes):
    run(teacher, batches(), tmp_path / "whole", **sizes)
    with pytest.raises(Stopped):
        run(teacher, stopping(count), tmp_path / "resumed", **sizes)
    run(teacher, batches(), tmp_path / "resumed", **sizes)
    assert files(tmp_path / "resumed") == files(tmp_path / "whole")


class Stops(Teacher):
    """Fails at its call after ``limit`` ones."""

    def __init__(self, limit=10**9):
        super().__init__()
        self.limit = limit

    def forward(self, input_ids, attention_mask=None):
        if self.calls == self.limit:
            raise Stopped
        return super().forward(input_ids, attention_mask)


@pytest.mark.parametrize("stop", [3, 18, 20, 23])  # the prototypes are learned in three passes over six batches
@pytest.mark.parametrize("sizes", [{}, {"shard_bytes": 60, "block_rows": 4}])
@pytest.mark.parametrize("again", [list, iter])
def test_a_resumed_capture_of_prototypes_keeps_its_table(tmp_path, stop, sizes, again):
    options = {"codec": "prototype", "k": 2, **sizes}
    run(Stops(), again(list(batches())), tmp_path / "whole", **options)
    with pytest.raises(Stopped):
        run(Stops(stop), again(list(batches())), tmp_path / "resumed", **options)
    last = Stops()
    run(last, again(list(batches())), tmp_path / "resumed", **options)
    assert files(tmp_path / "resumed") == files(tmp_path / "whole")
    if stop == 23:
        assert last.calls <= 6
    cache = kdfast.cache.open(tmp_path / "whole")
    assert {labels.kind for labels in map(cache.__getitem__, cache)} == {"prototype"}


SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["kdfast.cache"])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    paths = {name: tmp_path_factory.mktemp(name) for name in CAPTURES}
    for name, path in paths.items():
        capture_and_tell(path, name, lambda count: None)
    return {name: contents(path) for name, path in paths.items()}


def kill_at_batch(path, name, batch):
    """Run a capture in a process of its own, and SIGKILL it at its batch ``batch``. It may have ended by itself."""
    receiver, sender = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=capture_until_killed, args=(path, name, sender))
    process.start()
    sender.close()
    try:
        while receiver.recv() < batch:
            pass
    except EOFError:
        return
    process.kill()
    process.join()
    assert process.exitcode in (-signal.SIGKILL, 0)


def check_killed(path, name, batches_of_kills, uninterrupted):
    for batch in batches_of_kills:
        kill_at_batch(path, name, batch)
    capture_and_tell(path, name, lambda count: None)
    assert contents(path) == uninterrupted[name]
    assert sum(file.startswith("shard-") for file in uninterrupted[name]) > 1


KILLS = [("topk", [7]), ("sample", [12]), ("threshold", [29]), ("prototype", [50, 110]), ("sample", [2, 25])]


@pytest.mark.parametrize(("name", "kills"), KILLS)
def test_a_killed_capture_resumes_byte_for_byte(tmp_path, uninterrupted, name, kills):
    check_killed(tmp_path, name, kills, uninterrupted)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(50))
def test_captures_killed_at_many_points(tmp_path, uninterrupted, seed):
    draw = random.Random(seed)
    name = [*CAPTURES][seed % len(CAPTURES)]
    last = CAPTURE_BATCHES * (4 if name == "prototype" else 1)  # its prototypes are learned in three passes
    check_killed(tmp_path, name, [draw.randint(1, last) for _ in range(draw.choice([1, 1, 2]))], uninterrupted)


class Once(IterableDataset):
    """Documents of a source that gives them once, as an open file, a queue or a socket does."""

    def __init__(self, documents):
        self.source = iter(documents)

    def __iter__(self):
        yield from self.source


@pytest.mark.parametrize("count", [1, 7, 90])  # 90: more than learning takes
def test_every_document_of_a_stream_is_stored_though_prototypes_are_learned_first(
    tmp_path, teacher, monkeypatch, count
):
    monkeypatch.setattr(capture_module, "PREPARE_ROWS", 40 * LENGTH)
    documents = list(torch.cartesian_prod(*[torch.arange(1, VOCAB)] * 3)[:count])
    loader = DataLoader(Once([{"input_ids": ids} for ids in documents]), batch_size=4)
    report = run(teacher, loader, tmp_path, codec="prototype", k=2)
    cache = kdfast.cache.open(tmp_path)
    assert (report.records, len(cache)) == (count, count)
    assert all(ids in cache for ids in documents)
    with torch.no_grad():
        expected = teacher.eval()(documents[0][None])[0].topk(2).indices
    assert torch.equal(cache[documents[0]].ids.view(-1, 2).sort().values.long(), expected.sort().values)


def test_no_more_of_a_stream_is_kept_than_memory_allows(tmp_path, teacher, monkeypatch):
    monkeypatch.setattr(stream_module, "MOST_BYTES", 300)  # three of the batches, of 2 * 3 * 5 numbers
    run(teacher, batches(), tmp_path, codec="prototype", k=2)
    assert teacher.calls == 3 * 2 + 6
    assert all(ids in kdfast.cache.open(tmp_path) for ids in records())


def test_a_loader_may_fill_the_same_tensors_again(tmp_path, teacher):
    def reusing():
        buffer = torch.zeros(3, LENGTH, dtype=torch.long)
        for batch in batches():
            buffer.copy_(batch["input_ids"])
            yield {**batch, "input_ids": buffer}

    run(teacher, reusing(), tmp_path, codec="prototype", k=2)
    assert all(ids in kdfast.cache.open(tmp_path) for ids in records())


def test_an_empty_loader_has_nothing_to_learn_prototypes_of(tmp_path, teacher):
    with pytest.raises(ValueError, match="prototypes are learned from rows, and there is none"):
        run(teacher, [], tmp_path, codec="prototype")
    with pytest.raises(ValueError, match="prototypes must be a table or a positive number, got 0"):
        run(teacher, batches(), tmp_path, codec="prototype", prototypes=0)


@pytest.mark.parametrize(("codec", "options"), [("sample", {"draws": 5}), ("threshold", {"tau": 0.2})])
def test_a_resumed_capture_draws_the_same(tmp_path, teacher, codec, options):
    run(teacher, batches(), tmp_path / "whole", codec=codec, shard_bytes=80, **options)
    with pytest.raises(Stopped):
        run(teacher, stopping(3), tmp_path / "resumed", codec=codec, shard_bytes=80, **options)
    run(teacher, batches(), tmp_path / "resumed", codec=codec, shard_bytes=80, **options)
    assert files(tmp_path / "resumed") == files(tmp_path / "whole")


def test_batches_that_are_there_are_not_run(tmp_path, teacher):
    run(teacher, list(batches())[:4], tmp_path)
    teacher.calls = 0
    assert run(teacher, batches(), tmp_path)[:3] == (2, 4, 6)
    assert teacher.calls == 2
    assert run(teacher, batches(), tmp_path)[:3] == (0, 6, 0)
    assert teacher.calls == 2


def test_a_batch_that_is_partly_there_is_run_whole(tmp_path):
    shapes = []

    def teacher(x):
        shapes.append(tuple(x.shape))
        return x * len(shapes)

    x = torch.randn(4, VOCAB)
    first = {"key": [0, 1], "x": x[:2]}
    second = {"key": [1, 2, 3], "x": x[1:]}
    report = run(teacher, [first, second], tmp_path, teacher="t", inputs=lambda batch: batch["x"])
    assert shapes == [(2, VOCAB), (3, VOCAB)]
    assert report == (2, 0, 4, 4)
    cache = kdfast.cache.open(tmp_path)
    assert cache.info.duplicates == 0
    for key, factor in ((1, 1), (2, 2)):  # record 1 stays the first batch's
        assert (cache[key].values - (x[key] * factor).log_softmax(0)).abs().max() < 0.05


@pytest.mark.parametrize("fails", [False, True])
def test_training_flags_come_back(tmp_path, teacher, fails):
    teacher.train()
    teacher.embed.eval()
    flags = [module.training for module in teacher.modules()]
    if fails:
        with pytest.raises(Stopped):
            run(teacher, stopping(2), tmp_path)
    else:
        run(teacher, batches(), tmp_path)
    assert [module.training for module in teacher.modules()] == flags
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8], ids=str)
def test_mask_stores_supervised_rows_alone(tmp_path, teacher, dtype):
    def mask(batch):
        return (batch["input_ids"] > 4).to(dtype)

    run(teacher, batches(), tmp_path / "whole")
    run(teacher, batches(), tmp_path / "masked", mask=mask)
    whole, masked = (kdfast.cache.open(tmp_path / name) for name in ("whole", "masked"))
    assert masked.info.rows == sum(int((ids > 4).sum()) for ids in records()) < whole.info.rows
    for ids in records():
        assert torch.equal(masked[ids].values, whole[ids].values[ids > 4])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (lambda batch: 3 * (batch["input_ids"] > 4), "mask of a record of torch.int64 is a mask of 0 and 1, .* 0 to 3"),
        (lambda batch: (batch["input_ids"] > 4).float(), "mask of a record must be a bool tensor .*torch.float32"),
    ],
)
def test_what_is_no_mask_stores_nothing(tmp_path, teacher, mask, message):
    with pytest.raises(ValueError, match=message):
        run(teacher, batches(), tmp_path, mask=mask)


def test_targets_and_views_go_with_their_rows(tmp_path, teacher):
    batch = next(batches(1))
    views = [[View(seed=10 * i + j) for j in range(LENGTH)] for i in range(3)]
    run(
        teacher, [batch], tmp_path, mask=lambda b: b["input_ids"] % 2 == 0, targets=lambda b: b["input_ids"],
        views=lambda b: views,
    )  # fmt: skip
    cache = kdfast.cache.open(tmp_path)
    for i, (ids, real) in enumerate(zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)):
        key, kept = ids[real], real & (ids % 2 == 0)
        cache.check_targets([key], [ids[kept]])
        assert [view.seed for view in cache.views(key)] == (10 * i + kept.nonzero().flatten()).tolist()
        assert len(cache[key]) == kept.sum()


def test_images_have_one_row_a_target_and_a_view_each(tmp_path):
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(12, VOCAB)), torch.randn(4, 3, 2, 2)
    views = [View(flip=bool(i % 2), seed=i) for i in range(4)]
    batch = (images, torch.tensor([3, 1, 4, 1]), ["a", "b", "c", "d"])
    run(
        model, [batch], tmp_path, key=lambda b: b[2], targets=lambda b: b[1], views=lambda b: views,
    )  # fmt: skip
    cache = kdfast.cache.open(tmp_path)
    cache.check_targets(list("abcd"), [[3], [1], [4], [1]])
    assert [cache.views(name) for name in "abcd"] == [[view] for view in views]
    labels = cache.gather(["d", "a"])
    expected = model(images[[3, 0]]).log_softmax(1)
    assert (labels.values - expected).abs().max() < 0.05


def test_keys_of_a_tensor_are_the_numbers_in_it(tmp_path):
    for name, keys in (("one", torch.tensor([7, 8])), ("each", list(torch.tensor([7, 8])))):
        run(lambda x: x, [(torch.randn(2, VOCAB),)], tmp_path / name, key=lambda batch, keys=keys: keys, teacher="t")
        assert 7 in kdfast.cache.open(tmp_path / name)
    with pytest.raises(TypeError, match="key must give one key per record, got one str, 'ab'"):
        run(lambda x: x, [(torch.randn(2, VOCAB),)], tmp_path / "no", key=lambda batch: "ab", teacher="t")


@codecs.register
class Draws(codecs.FixedWidthCodec):
    """Stands for the codecs that draw: keeps ``draws`` and what the key seeds."""

    name = "draws for a test"
    kind = "weights"
    drawn = True

    def __init__(self, vocab_size, temperatures, *, draws=4):
        super().__init__(vocab_size, temperatures)
        self.draws, self.row_dtype = draws, "<f4"
        self.row_dtype = np.dtype([("seed", "<f4")])

    def config(self):
        return {"draws": self.draws}

    @classmethod
    def refined(cls, options, epochs):
        return {**options, "draws": options.get("draws", 4) * epochs}

    def select(self, logits, key):
        seed = torch.full((len(logits), 1), float(int.from_bytes(key[:2], "little")))
        return SoftLabels.weights(torch.zeros(len(logits), 1).long(), seed, vocab_size=self.vocab_size)

    def encode(self, labels):
        return labels.values.numpy().tobytes()

    def unpack(self, packed):
        values = torch.from_numpy(packed["seed"].copy())[:, None]
        return SoftLabels.weights(torch.zeros(len(packed), 1).long(), values, vocab_size=self.vocab_size)


def test_replicas_are_draws_of_their_own(tmp_path, teacher):
    report = run(teacher, batches(2), tmp_path, codec=Draws.name, epochs=3, reuse="replicas")
    cache = kdfast.cache.open(tmp_path)
    assert cache.info.config == {"draws": 4}
    assert len(cache) == report.records == 3 * 6
    for ids in list(records())[:6]:
        seeds = {float(cache[replica_key(ids, r)].values[0]) for r in range(3)}
        assert len(seeds) == 3
        assert torch.equal(cache[ids].values, cache[replica_key(ids, 0)].values)
    teacher.calls = 0
    assert run(teacher, batches(2), tmp_path, codec=Draws.name, epochs=3, reuse="replicas").skipped == 2
    # Two more epochs: the batches are run again, and only what lacks is added.
    assert run(teacher, batches(2), tmp_path, codec=Draws.name, epochs=5, reuse="replicas")[:3] == (2, 0, 12)


def test_draws_learn_a_table_of_whole_rows_if_asked_for_one(tmp_path, teacher):
    run(teacher, batches(4), tmp_path / "a", codec="sample", draws=6, prototypes=3)
    run(teacher, batches(2), tmp_path / "b", codec="sample", draws=6, prototypes=3)
    run(teacher, batches(4), tmp_path / "b", codec="sample", draws=6, prototypes=3)  # takes up the table that it finds
    cache = kdfast.cache.open(tmp_path / "a")
    labels = cache.gather(list(cache))
    assert labels.prototypes.shape[0] <= 3
    assert len(kdfast.cache.open(tmp_path / "b")) == len(cache)
    run(teacher, batches(2), tmp_path / "c", codec="sample", draws=6)
    assert kdfast.cache.open(tmp_path / "c").gather(list(kdfast.cache.open(tmp_path / "c"))).prototypes is None


def test_refining_draws_more(tmp_path, teacher):
    run(teacher, batches(2), tmp_path / "default", codec=Draws.name, epochs=3)
    run(teacher, batches(2), tmp_path / "given", codec=Draws.name, epochs=3, draws=10)
    for name, expected in (("default", 12), ("given", 30)):
        cache = kdfast.cache.open(tmp_path / name)
        assert (cache.info.config, len(cache)) == ({"draws": expected}, 6)
    assert codecs.find("sample").refined({}, 3) == {"draws": 150}
    assert codecs.find("threshold").refined({"tau": 0.06}, 3)["tau"] == pytest.approx(0.02)


@pytest.mark.parametrize("reuse", ["refine", "replicas"])
def test_epochs_change_nothing_for_a_codec_without_draws(tmp_path, teacher, reuse):
    run(teacher, batches(), tmp_path / "once")
    run(teacher, batches(), tmp_path / "often", epochs=5, reuse=reuse)
    assert files(tmp_path / "often") == files(tmp_path / "once")


def test_another_teacher_is_refused(tmp_path, teacher):
    run(teacher, batches(), tmp_path)
    with torch.no_grad():
        teacher.head.bias[0] += 1e-3
    with pytest.raises(CacheMismatchError, match="teacher="):
        run(teacher, batches(), tmp_path)


def test_fingerprints_change_with_config_names_types_and_bits():
    def model(**changes):
        made = nn.Linear(3, 2, dtype=changes.get("dtype"))
        with torch.no_grad():
            made.weight.copy_(torch.arange(6).reshape(2, 3))
            made.bias.fill_(changes.get("bias", 0.0))
        made.config = {"hidden_size": changes.get("size", 3), "_name_or_path": changes.get("path", "")}
        return nn.ModuleDict({"x": made}) if "wrapped" in changes else made

    same = kdfast.cache.fingerprint(model())
    assert same == kdfast.cache.fingerprint(model(path="elsewhere"))
    others = [{"bias": 1.0}, {"bias": -0.0}, {"size": 4}, {"dtype": torch.float64}, {"wrapped": True}]
    found = {kdfast.cache.fingerprint(model(**change)) for change in others}
    assert len(found | {same}) == 6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": lambda **x: x}, ValueError, "no nn.Module needs teacher="),
        ({"model": lambda **x: "x", "teacher": "t"}, TypeError, "the teacher returned a str without logits"),
        ({"loader": [(torch.zeros(2, 3),)]}, ValueError, r"a tuple without input_ids or key needs key="),
        ({"key": lambda batch: [1]}, ValueError, "the batch has 1 keys, but the teacher's output has 3 records"),
        ({"targets": lambda batch: [torch.zeros(1)]}, ValueError, "3 keys, but targets has 1 records"),
        ({"targets": lambda batch: torch.zeros(3, 2).long()}, ValueError, "targets of a record must .* 5, got 2"),
        ({"mask": lambda batch: batch["input_ids"][:, 1:] > 0}, ValueError, "mask of a record .* per row: 5, got 4"),
        ({"outputs": lambda output, batch: output[..., None]}, ValueError, r"must be \(rows, vocab\) or"),
        (
            {"outputs": lambda output, batch: output[..., None]},
            ValueError,
            r"got \(5, 9, 1\).*several layers of a row's hidden states are a cache each",
        ),
        ({"epochs": 0}, ValueError, "epochs must be positive"),
        ({"reuse": "again"}, ValueError, "reuse .* got 1 and 'again'"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, teacher, change, error, message):
    arguments = {"model": teacher, "loader": batches(), "path": tmp_path, **change}
    with pytest.raises(error, match=message):
        run(**arguments)


def test_the_bar_tells_batches_and_rows(tmp_path, teacher, capsys, monkeypatch):
    monkeypatch.setattr(_progress, "INTERVAL", 0.0)  # a line at each batch
    capture(teacher, list(batches()), tmp_path, vocab_size=VOCAB, codec="dense")
    assert re.fullmatch(
        r"(capture: \d/6 batches, [\d,]+ rows/s, after 0:00:0\d(, 0:00:0\d left)?\n){7}", capsys.readouterr().err
    )
    capture(teacher, list(batches()), tmp_path / "learned", vocab_size=VOCAB, codec="prototype")
    shown = capsys.readouterr().err
    assert (shown.count("learn: "), shown.count("capture: ")) == (3 * 6 + 1, 7)


# ---- codec="auto" ---------------------------------------------------------------------------------------------------


def test_auto_takes_whole_rows_of_a_small_vocabulary(tmp_path, teacher):
    run(teacher, batches(), tmp_path, codec="auto", bits=4)
    info = kdfast.cache.open(tmp_path).info
    assert (info.codec, info.config["bits"]) == ("dense", 4)
    assert info.codec_reason.startswith("a small vocabulary")


def test_auto_takes_topk_at_other_temperatures(tmp_path):
    size = SMALL_VOCAB + 1
    with kdfast.cache.Writer(tmp_path, vocab_size=size, codec="auto", temperatures=(1.0, 2.0), k=3) as writer:
        writer.add(0, torch.randn(1, size))
    info = kdfast.cache.open(tmp_path).info
    assert (info.codec, info.config["k"]) == ("topk", 3)
    assert "exact mass of the rest" in info.codec_reason


@pytest.mark.parametrize("vocab_size", [10, SMALL_VOCAB, SMALL_VOCAB + 1, 2**20])
@pytest.mark.parametrize("temperatures", [(1.0,), (2.0,), (1.0, 4.0)])
@pytest.mark.parametrize("divergence", [None, *DIVERGENCES])
@pytest.mark.parametrize("prototypes", [False, True])
@pytest.mark.parametrize("student_kl", [None, 0.3, 2, "far"])
def test_the_choice_serves_what_was_asked_for(vocab_size, temperatures, divergence, prototypes, student_kl):
    name, options, why = codecs.choose(
        vocab_size, temperatures, divergence, prototypes=prototypes, student_kl=student_kl
    )
    serves = SERVES[codecs.find(name).kind].divergences
    # Draws have forward KL's gradient as soft_ce; the reason says so.
    wanted = {"forward_kl": "soft_ce", None: "soft_ce"}.get(divergence, divergence)
    assert wanted in serves
    assert name == "dense" if vocab_size <= SMALL_VOCAB else name != "dense"
    assert why
    far = student_kl in (2, "far")
    assert name != "prototype" or (prototypes and len(temperatures) == 1 and far)
    if vocab_size <= SMALL_VOCAB:
        return
    if prototypes and len(temperatures) == 1 and far:
        assert name == ("hidden" if divergence == "logit_mse" else "prototype")
    elif temperatures == (1.0,) and wanted == "soft_ce":
        assert (name, options) == LARGE_VOCAB[:2]
        assert "soft_ce" in why


@pytest.mark.parametrize("student_kl", ["near", "", -0.1, float("nan"), True, [1.0]])
@pytest.mark.parametrize("codec", ["auto", "dense"])
def test_a_distance_is_a_number_of_nats_or_far(tmp_path, teacher, student_kl, codec):
    with pytest.raises(ValueError, match=r'student_kl must be KL\(teacher \|\| student\) in nats, or "far"'):
        run(teacher, batches(), tmp_path, codec=codec, student_kl=student_kl)
    assert not list(tmp_path.iterdir())


def wide(input_ids):
    generator = torch.Generator().manual_seed(int(input_ids.sum()))
    return torch.randn(2, 3, SMALL_VOCAB + 1, generator=generator)


WIDE = {"codec": "auto", "vocab_size": SMALL_VOCAB + 1, "teacher": "t"}
IDS = {"input_ids": torch.arange(6).view(2, 3)}


def test_auto_takes_no_label_with_a_floor_unless_the_student_is_far(tmp_path):
    given = {"none": {}, "near": {"student_kl": 0.7}, "limit": {"student_kl": FAR_KL}, "far": {"student_kl": "far"}}
    found = {}
    for name, options in given.items():
        report = run(wide, [IDS], tmp_path / name, **WIDE, **options)
        found[name] = kdfast.cache.open(tmp_path / name).info
        assert (report.floor and report.floor.text()) == (found[name].floor and found[name].floor.text())
        assert found[name].codec_reason
    assert [info.codec for info in found.values()] == ["sample", "sample", "prototype", "prototype"]
    assert found["none"].config["draws"] == LARGE_VOCAB.options["draws"]
    assert found["none"].floor is None
    assert found["none"].floor_text == "none: unbiased, with the noise of 23 draws a row"
    assert found["far"].floor.kl > 0.01
    assert report.text().endswith(f"; floor: {found['far'].floor.text()}")


def test_auto_learns_prototypes_unless_the_loader_is_an_iterator(tmp_path):
    for name, loader in [("sample", iter([IDS])), ("prototype", [IDS])]:
        run(wide, loader, tmp_path / name, **WIDE, student_kl="far")
        assert kdfast.cache.open(tmp_path / name).info.codec == name


def test_auto_says_what_it_would_need_and_what_there_is_for_far_students(tmp_path):
    with pytest.raises(ValueError, match=r"'hidden', for this loss needs whole rows.*\"far\" .* comes to 'prototype'"):
        run(wide, [IDS], tmp_path, **WIDE, divergence="reverse_kl")
    with pytest.raises(ValueError, match=r"'hidden', for this loss needs whole rows.*that are hidden states$"):
        run(wide, [IDS], tmp_path, **WIDE, divergence="logit_mse")
    with pytest.raises(ValueError, match="comes to 'sample', which learns no prototypes"):
        run(wide, [IDS], tmp_path, **WIDE, prototypes=4)
    assert not list(tmp_path.iterdir())
    run(wide, [IDS], tmp_path, **WIDE, divergence="reverse_kl", student_kl="far", prototypes=4)
    assert kdfast.cache.open(tmp_path).info.codec == "prototype"


def test_integer_keys_can_be_the_numbers_of_a_range(tmp_path):
    x = torch.randn(6, VOCAB)
    loader = [(x[:4], range(4)), (x[4:], range(4, 6))]
    run(lambda x: x, loader, tmp_path, key=lambda batch: batch[1], teacher="t", keys="range")
    cache = kdfast.cache.open(tmp_path)
    assert cache.info.keys == "range"
    assert (cache.gather([5, 0]).values - x[[5, 0]].log_softmax(1)).abs().max() < 0.05


# ---- what a capture meets again -------------------------------------------------------------------------------------


def pictures(teacher, path, names, x, y, **options):
    """A capture of images, keyed by ``names``, four to a batch."""
    at = [slice(i, i + 4) for i in range(0, len(names), 4)]
    loader = [(x[rows], y[rows], names[rows]) for rows in at]
    return run(teacher, loader, path, key=lambda b: b[2], **{"teacher": "t", "targets": lambda b: b[1], **options})


@pytest.fixture
def folder():
    generator = torch.Generator().manual_seed(3)
    names = [f"{side}/{i}.png" for i in range(8) for side in ("cat", "dog")]
    x = torch.randn(16, VOCAB, generator=generator) * 3
    return names, x, torch.tensor([0, 1] * 8)


def test_images_that_share_a_name_are_counted_and_warned_of(tmp_path, folder):
    names, x, y = folder
    with pytest.warns(
        UserWarning, match=r"'0.png' came again with other targets or logits.*key=\(lambda batch"
    ) as warned:
        report = pictures(lambda x: x, tmp_path / "names", [name[4:] for name in names], x, y)
    assert warned[0].filename == __file__
    assert report[:4] == (4, 0, 8, 8)
    assert (report.known, report.duplicates, report.conflicts, report.bad) == (0, 8, 8, 0)
    assert report.text().partition("; floor: ")[0] == (
        "8 records, 8 rows added; 0 records were stored already; 8 came again; 8 came with other targets or logits"
    )
    report = pictures(lambda x: x, tmp_path / "paths", names, x, y)
    assert (report.records, report.duplicates, report.conflicts) == (16, 0, 0)


def test_other_logits_are_noticed_where_there_are_no_targets_or_equal_ones(tmp_path, folder):
    names, x, y = folder
    for targets, path in ((None, "a"), (lambda b: torch.zeros_like(b[1]), "b")):
        with pytest.warns(UserWarning, match=r"'0.png' came again"):
            report = pictures(lambda x: x, tmp_path / path, [name[4:] for name in names], x, y, targets=targets)
        assert report.duplicates == 8
        assert report.conflicts >= 7  # all that are not alike


def test_whole_batches_that_come_again_are_looked_at_once_where_there_are_no_targets(tmp_path, folder):
    """The teacher need not run for them, but nothing else could tell that the second folder's images are others."""
    names, x, y = folder
    order = [*range(0, 16, 2), *range(1, 16, 2)]
    names, x = [names[i][4:] for i in order], x[order]
    with pytest.warns(UserWarning, match=r"'0.png' came again with other targets or logits"):
        report = pictures(lambda x: x, tmp_path / "others", names, x, y, targets=None)
    assert (report.batches, report.skipped, report.duplicates) == (2, 2, 8)
    assert report.conflicts > 0
    calls = []
    same = pictures(lambda x: calls.append(x) or x, tmp_path / "same", [*names[:8]] * 2, x[:8].repeat(2, 1), y,
                    targets=None)  # fmt: skip
    assert (same[:2], same.duplicates, same.conflicts, len(calls)) == ((2, 2), 8, 0, 3)


def test_a_record_that_comes_again_as_it_was_is_no_conflict(tmp_path, folder):
    names, x, y = folder
    noise = iter(torch.randn(8, 4, VOCAB) * 0.03)  # another batch around it, in half precision
    report = pictures(lambda x: x + next(noise), tmp_path, [*names, *names], torch.cat([x, x]), torch.cat([y, y]))
    assert (report.batches, report.skipped) == (4, 4)
    assert (report.records, report.duplicates, report.conflicts) == (16, 16, 0)
    one = [(torch.cat([x[:2], x[:2] + 0.01]), torch.cat([y[:2], y[:2]]), [*names[:2], *names[:2]])]
    report = run(lambda x: x, one, tmp_path / "one", key=lambda b: b[2], teacher="t")
    assert (report.records, report.duplicates, report.conflicts) == (2, 2, 0)


def test_other_targets_than_the_cache_s_are_noticed_without_a_teacher_pass(tmp_path, folder):
    names, x, y = folder
    pictures(lambda x: x, tmp_path, names, x, y)
    report = pictures(None, tmp_path, names, x, y)
    assert (report.skipped, report.known, report.conflicts) == (4, 16, 0)
    with pytest.warns(UserWarning, match=r"'cat/3.png' came again"):
        report = pictures(None, tmp_path, names, x, y.where(torch.arange(16) != 6, 5))
    assert (report.known, report.duplicates, report.conflicts) == (16, 0, 1)


def test_another_mask_than_the_records_were_stored_with_is_refused(tmp_path, teacher):
    def even(batch):
        return batch["input_ids"] % 2 == 0

    run(teacher, batches(), tmp_path / "masked", mask=even)
    run(teacher, batches(), tmp_path / "whole")
    assert run(teacher, batches(), tmp_path / "masked", mask=even).skipped == 6
    with pytest.raises(CacheMismatchError, match=r"is in the cache with \d rows, and has \d now: .* another mask="):
        run(teacher, batches(), tmp_path / "whole", mask=even)
    with pytest.raises(CacheMismatchError, match=r"is in the cache with \d rows, and has \d now: .* another mask="):
        run(teacher, batches(), tmp_path / "masked")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8], ids=str)
def test_a_mask_of_integers_that_comes_again_is_no_conflict(tmp_path, teacher, dtype):
    def mask(batch):
        return (batch["input_ids"] % 2).to(dtype)

    for known in (0, len(list(records()))):
        report = run(teacher, batches(), tmp_path, mask=mask, targets=lambda batch: batch["input_ids"])
        assert (report.known, report.conflicts) == (known, 0)


def test_one_row_of_a_text_is_no_other_mask(tmp_path):
    def classifies(input_ids, attention_mask):
        return torch.nn.functional.one_hot(input_ids.sum(1) % VOCAB, VOCAB).float()

    for skipped in (0, 6):
        assert run(classifies, batches(), tmp_path, teacher="t").skipped == skipped


def test_reports_add_up_and_survive_pickling():
    a = kdfast.cache.CaptureReport(1, 2, 3, 4, known=5, conflicts=6)
    total = kdfast.cache.CaptureReport.total([a, pickle.loads(pickle.dumps(a))])
    assert (*total, total.known, total.duplicates, total.conflicts, total.bad) == (2, 4, 6, 8, 10, 0, 12, 0)
    assert repr(a).endswith("rows=4, known=5, duplicates=0, conflicts=6, bad=0)")


def test_reports_of_several_processes_have_the_floor_of_all_their_rows(tmp_path, teacher):
    """As the workers of a cluster and the processes of torchrun give them."""
    parts = [list(batches())[i::2] for i in range(2)]
    reports = [run(teacher, part, tmp_path, writer=str(i), bits=4) for i, part in enumerate(parts)]
    total = kdfast.cache.CaptureReport.total(pickle.loads(pickle.dumps(reports)))
    assert total.floor.rows == sum(report.floor.rows for report in reports) == total.rows
    assert total.floor.text() == kdfast.cache.open(tmp_path).floor.text()
    assert reports[0].floor.kl != reports[1].floor.kl
    assert repr(total).endswith(f"bad=0, floor={total.floor})")
    assert run(teacher, parts[0], tmp_path, writer="0", bits=4).floor is None  # nothing was added


# ---- rows that cannot be stored -------------------------------------------------------------------------------------


class Spoils(Teacher):
    """Gives NaN in row 1 of every record that begins with the id 4."""

    def forward(self, input_ids, attention_mask=None):
        logits = super().forward(input_ids, attention_mask)
        logits[input_ids[:, 0] == 4, 1, 2] = float("nan")
        return logits


@pytest.mark.parametrize("codec", ["dense", "prototype", "topk"])
def test_a_row_that_is_not_finite_is_named_or_its_record_is_left_out(tmp_path, codec):
    bad = [ids for ids in records() if ids[0] == 4]
    assert 0 < len(bad) < 18
    with pytest.raises(ValueError, match=r"ids \[4, .*row 1 has a value of nan.*on_bad=\"skip\""):
        run(Spoils(), batches(), tmp_path / "raise", codec=codec)
    report = run(Spoils(), batches(), tmp_path / "skip", codec=codec, on_bad="skip")
    assert (report.bad, report.records) == (len(bad), 18 - len(bad))
    cache = kdfast.cache.open(tmp_path / "skip")
    assert [ids in cache for ids in records()] == [ids[0] != 4 for ids in records()]
    again = run(Spoils(), batches(), tmp_path / "skip", codec=codec, on_bad="skip")
    assert (again.bad, again.records) == (len(bad), 0)


@pytest.mark.parametrize("codec", ["topk", "prototype"])
def test_only_the_columns_that_are_stored_can_be_bad(tmp_path, codec):
    def teacher(x):
        rows = nn.functional.pad(x, (0, 2), value=torch.nan if x[0, 0] > 0 else 0.0)
        rows[1, :VOCAB] = -torch.inf
        return rows

    x = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(0))
    loader = [(rows, [f"{i}{j}" for j in range(4)]) for i, rows in enumerate((x[:4].abs(), -x[4:].abs()))]
    options = {"key": lambda b: b[1], "teacher": "t", "teacher_vocab_size": VOCAB + 2, "codec": codec}
    with pytest.raises(ValueError, match=r"row 0 has no finite value; on_bad=\"skip\""):
        run(teacher, loader, tmp_path / "raise", **options)
    report = run(teacher, loader, tmp_path / "skip", on_bad="skip", **options)
    assert (report.bad, report.records) == (2, 6)


def test_what_on_bad_may_be(tmp_path, teacher):
    with pytest.raises(ValueError, match=r"on_bad must be .*, got 'drop'"):
        run(teacher, batches(), tmp_path, on_bad="drop")
    with pytest.raises(ValueError, match='keys="range" are consecutive'):
        run(teacher, batches(), tmp_path, on_bad="skip", keys="range")
