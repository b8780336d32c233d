"""Holm's correction and paired comparisons, against numbers computed by hand."""

import math

import pytest

pytest.importorskip("scipy")

from kdfast.experiments.statistics import compare, holm


class TestHolm:
    def test_is_the_step_down_procedure(self):
        assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
        assert holm([0.04, 0.005, 0.02, 0.03]) == pytest.approx([0.06, 0.02, 0.06, 0.06])

    def test_one_comparison_is_left_alone_and_none_passes_one(self):
        assert holm([0.2]) == [0.2]
        assert holm([0.5, 0.9]) == [1.0, 1.0]
        assert holm([]) == []


REFERENCE = {0: 0.80, 1: 0.82, 2: 0.78, 3: 0.81}


class TestCompare:
    def test_difference_and_p_are_paired(self):
        arm = {0: 0.83, 1: 0.84, 2: 0.82, 3: 0.84}  # differences .03, .02, .04, .03: mean .03, std .00816
        found = compare({"arm": arm}, REFERENCE)["arm"]
        assert found.difference == pytest.approx(0.03)
        assert found.std == pytest.approx(math.sqrt(2e-4 / 3))
        # t = .03 / (.00816 / 2) = 7.348 with 3 degrees of freedom, whose distribution has a closed form.
        t = 0.03 / math.sqrt(2e-4 / 3 / 4)
        x = t / math.sqrt(3)
        assert found.p == pytest.approx(1 - 2 / math.pi * (math.atan(x) + x / (1 + x * x)))
        assert found.verdict == "helps"

    def test_verdicts_are_corrected_for_the_number_of_arms(self):
        weak = {0: 0.81, 1: 0.84, 2: 0.795, 3: 0.82}  # p = .01
        alone = compare({"weak": weak}, REFERENCE)["weak"]
        assert alone.verdict == "helps"
        among = compare({"weak": weak, **{str(i): {0: 0.8, 1: 0.8, 2: 0.8, 3: 0.8} for i in range(9)}}, REFERENCE)
        assert among["weak"].p == alone.p
        assert among["weak"].verdict == "no evidence"

    def test_what_is_worse_hurts_and_what_is_equal_does_not(self):
        worse = {seed: score - 0.05 - 0.001 * seed for seed, score in REFERENCE.items()}
        found = compare({"worse": worse, "equal": dict(REFERENCE)}, REFERENCE)
        assert found["worse"].verdict == "hurts"
        assert (found["equal"].p, found["equal"].verdict) == (1.0, "no evidence")

    def test_only_shared_seeds_count(self):
        arm = {seed: score + 0.1 for seed, score in REFERENCE.items()} | {9: 0.0}
        assert compare({"arm": arm}, REFERENCE)["arm"].difference == pytest.approx(0.1)

    def test_too_few_pairs_are_refused(self):
        with pytest.raises(ValueError, match="arm shares 2 seeds with its reference; 3 are needed"):
            compare({"arm": {0: 0.5, 1: 0.5}}, REFERENCE)
