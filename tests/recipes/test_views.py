"""Augmentation and cache agree: a label is of the pixels, or the ids, that the student sees."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import kdfast.cache
from kdfast.cache import CacheDataset, CacheError, CacheMismatchError, View, codecs
from kdfast.recipes import ViewedExamples, capture_views, crop_and_flip, noise_tokens, random_view, view_span

NAMES = [f"image {i}" for i in range(5)]
augment = partial(crop_and_flip, size=(6, 6), noise=0.1)


@pytest.fixture(scope="module")
def images():
    return torch.rand(5, 2, 9, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def teacher():
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4)).double()


@pytest.fixture(scope="module")
def cache(tmp_path_factory, teacher, images):
    path = tmp_path_factory.mktemp("views")
    options = {"augment": augment, "vocab_size": 4, "views": 3, "batch_size": 2, "progress": False}
    report = capture_views(teacher, NAMES, images.double(), path, **options)
    assert (report.batches, report.records, report.rows) == (3, 5, 15)
    again = capture_views(teacher, NAMES, images.double(), path, **options)
    assert (again.batches, again.skipped) == (0, 3)
    return kdfast.cache.open(path)


def stored(teacher, image):
    """What the cache keeps of the teacher's output."""
    with torch.no_grad():
        logits = teacher.eval()(image[None])
    return codecs.find("dense")(4, (1.0,)).select(logits, b"").values


def decoded(labels):
    return labels.values - labels.values.logsumexp(1, keepdim=True)


def test_labels_are_the_teacher_s_of_the_repeated_augmentation(cache, teacher, images):
    examples = ViewedExamples(cache, NAMES, images.double(), augment, labels=range(5))
    assert len(examples) == 15
    data = CacheDataset(cache, examples.keys, examples)
    loader = DataLoader(data, batch_size=4, shuffle=True, collate_fn=data.collate)
    seen = 0
    for (batch, names), labels in loader:
        for image, values in zip(batch, decoded(labels.unpack()), strict=True):
            wanted = stored(teacher, image)[0]
            step = (wanted.max() - wanted.min()) / 254  # of the codec's quantisation
            assert (values - wanted).abs().max() <= step
            seen += 1
        assert names.dtype == torch.int64
    assert seen == 15


def test_views_differ_by_more_than_the_codec_s_error(cache, teacher, images):
    """So that the test above would notice another view's labels."""
    for number in range(5):
        rows = decoded(cache.gather([NAMES[number]]))
        step = (rows.amax(1) - rows.amin(1)).max() / 254
        assert torch.cdist(rows, rows, p=torch.inf)[~torch.eye(3, dtype=torch.bool)].min() > 5 * step


def test_another_augmentation_than_the_teacher_s_is_refused(cache):
    known = cache.views(NAMES[2])[1]
    assert known == random_view(NAMES[2], 1)
    assert view_span(cache, NAMES[2], known) == (NAMES[2], 1, 1)
    assert torch.equal(cache.gather([view_span(cache, NAMES[2], known)]).values, cache[NAMES[2]].values[1:2])
    for other in (View(known.crop, not known.flip, known.seed), View(known.crop, known.flip, known.seed + 1), View()):
        with pytest.raises(CacheMismatchError, match="the teacher has not seen 'image 2' under View"):
            view_span(cache, NAMES[2], other)
    with pytest.raises(KeyError, match="image 7"):
        view_span(cache, "image 7", known)


def test_a_cache_without_views_is_refused(tmp_path, teacher, images):
    with kdfast.cache.Writer(tmp_path, vocab_size=4, codec="dense", teacher="t") as writer:
        writer.add(NAMES[0], torch.zeros(4))
    with pytest.raises(CacheError, match="without views"):
        ViewedExamples(kdfast.cache.open(tmp_path), NAMES[:1], images[:1], augment)


@pytest.mark.parametrize("changed", [{"views": 0}, {"samples": [1]}])
def test_numbers_that_do_not_fit_are_named(tmp_path, teacher, changed):
    options = {"samples": NAMES, "views": 2, **changed}
    samples = options.pop("samples")
    with pytest.raises(ValueError, match="each sample needs a key and a view"):
        capture_views(teacher, NAMES, samples, tmp_path, augment=augment, vocab_size=4, **options)


def test_examples_need_as_many_labels(cache, images):
    with pytest.raises(ValueError, match="5 keys need as many labels, got 4"):
        ViewedExamples(cache, NAMES, images, augment, labels=range(4))


# ---- what a view decides --------------------------------------------------------------------------------------------


def test_a_view_s_crop_is_the_part_of_the_image_then_mirrored():
    image = torch.arange(2.0 * 8 * 10).view(2, 8, 10)
    view = View(crop=(0.25, 0.5, 0.5, 0.3), flip=True)
    torch.testing.assert_close(crop_and_flip(image, view, size=(4, 3)), image[:, 2:6, 5:8].flip(-1))
    torch.testing.assert_close(crop_and_flip(image, View(), size=(8, 10)), image)
    assert crop_and_flip(image, View(crop=(1, 1, 0, 0)), size=(1, 1)).flatten().tolist() == [79.0, 159.0]


def test_noise_is_the_seed_s_and_has_the_deviation():
    image = torch.zeros(1, 100, 100)
    same, again, other = (crop_and_flip(image, View(seed=s), size=(100, 100), noise=0.2) for s in (3, 3, 4))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)
    assert same.std().item() == pytest.approx(0.2, rel=0.05)


def test_views_are_a_function_of_key_and_number():
    views = [random_view("a", number, smallest=0.4) for number in range(200)]
    assert views == [random_view("a", number, smallest=0.4) for number in range(200)]
    assert len({view.seed for view in views}) == 200
    assert views[0] != random_view("b", 0, smallest=0.4)
    top, left, height, width = torch.tensor([view.crop for view in views]).T
    assert min(height.min(), width.min()) >= 0.4 - 1e-4
    assert max((top + height).max(), (left + width).max()) <= 1 + 1e-4
    assert 70 < sum(view.flip for view in views) < 130
    # Pinned: a cache outlives the versions of every library.
    crop = 0.13295185778591592, 0.04870679789425498, 0.7734798199435416, 0.5485160601205463
    assert random_view("a", 0) == View(crop, flip=False, seed=1175151614)


def test_tokens_are_replaced_at_the_rate_by_the_seed():
    ids = torch.arange(1000)
    dropped = noise_tokens(ids, View(seed=1), rate=0.3, token=5000)
    assert 230 < (dropped == 5000).sum() < 370
    assert torch.equal(dropped[dropped != 5000], ids[dropped != 5000])
    assert torch.equal(dropped, noise_tokens(ids, View(seed=1, flip=True), rate=0.3, token=5000))
    replaced = noise_tokens(ids, View(seed=1), rate=0.3, vocab_size=7)
    assert torch.equal(replaced != ids, dropped != ids)
    assert set(replaced[dropped == 5000].tolist()) == set(range(7))
    assert torch.equal(noise_tokens(ids, View(seed=1), rate=0.0, token=1), ids)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: random_view("a", 0, smallest=0.0), ValueError, r"smallest must lie in \(0, 1\]"),
        (lambda: crop_and_flip(torch.zeros(3, 3), View(), size=(2, 2)), TypeError, r"\(C, H, W\)"),
        (lambda: noise_tokens(torch.zeros(3), View(), token=1), TypeError, "ids must be integers"),
        (lambda: noise_tokens(torch.arange(3), View()), ValueError, "one of token and vocab_size"),
        (lambda: noise_tokens(torch.arange(3), View(), rate=2.0, token=1), ValueError, "rate 2.0"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
