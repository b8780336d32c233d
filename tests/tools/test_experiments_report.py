# ruff: noqa: E402  (what needs the extra is imported after the check that it is there)
"""``kdfast experiments``: the page is whole HTML that needs nothing else, and says what the runs say."""

import base64
import json
import struct
import zlib
from dataclasses import replace
from html.parser import HTMLParser

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("mlxtend")
pytest.importorskip("jinja2")
testing = pytest.importorskip("typer.testing")

from kdfast.cli.app import app
from kdfast.experiments.catalogue import EXPERIMENTS
from kdfast.experiments.report import html, write_report
from kdfast.experiments.runner import complete, file_of
from kdfast.experiments.settings import Settings
from kdfast.experiments.store import FINAL, TUNING, ResultsError, Run, Store
from kdfast.experiments.summary import language_rows, summaries, summarise

VOID = {"meta", "img", "br", "hr", "link"}
ABOUT = {"seconds": 1.0, "date": "2026-11-22T00:00:00+00:00", "commit": "abc", "torch": "2.13.0"}


class Page(HTMLParser):
    """Fails on tags out of order; collects pictures, links to elsewhere, table rows and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.addresses, self.rows, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.addresses += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "img":
            assert attributes["alt"]
            self.images.append(attributes["src"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def decoded(uri):
    """(width, height) of a PNG in a data URI, every chunk's checksum looked at."""
    head, _, body = uri.partition(",")
    assert head == "data:image/png;base64"
    data = base64.b64decode(body, validate=True)
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    at, pixels = 8, b""
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunk = data[at + 4 : at + 8 + length]
        assert zlib.crc32(chunk) == struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0]
        pixels += chunk[4:] if chunk.startswith(b"IDAT") else b""
        at += 12 + length
    assert chunk == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    assert len(zlib.decompress(pixels)) > width * height
    return width, height


def runs(scores, stage=FINAL, options=None, settings="print"):
    """Of a mapping from arms to clean accuracies, by seed."""
    return [
        Run(arm, stage, seed, options or {}, settings, {"clean": value}, ABOUT)
        for arm, values in scores.items()
        for seed, value in enumerate(values)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Results of two experiments on a few arms, trained for next to nothing."""
    out = tmp_path_factory.mktemp("experiments")
    quick = Settings().quick()
    schedule = replace(quick.student, epochs=2, steps_per_epoch=2)
    tiny = replace(quick, student=schedule, teacher=schedule, source_teacher=schedule)
    for name in ("few-labels-digits", "few-characters"):
        wanted = ("no_kd", "smoothing", "kd_own", "kd", "kd_all", "mutual", "all_labels", "teacher")
        arms = tuple(arm for arm in EXPERIMENTS[name].arms if arm.name in wanted)
        complete(replace(EXPERIMENTS[name], arms=arms), tiny, out)
    return out


@pytest.fixture(scope="module")
def page(folder):
    return Page(write_report(folder, folder / "report.html").read_text("utf-8"))


class TestPage:
    def test_pictures_are_inside_and_whole(self, page):
        assert len(page.images) == 3  # accuracies of both, corruptions of the digits
        for image in page.images:
            width, height = decoded(image)
            assert width > 500
            assert height > 200

    def test_needs_nothing_from_elsewhere(self, page):
        assert all(address.startswith("data:") for address in page.addresses)
        assert "script" not in page.text
        assert "http" not in page.text

    def test_claim_comes_first_with_its_controls(self, page):
        assert page.text.index("80.5 % → 88.2 %") < page.text.index("How to read this")
        titles = [row[0] for row in page.rows[1:7]]
        assert titles[:2] == ["no KD", "label smoothing"]
        assert "teacher of the student's labels" in titles[2]
        assert "trained on all 1200 training labels" in page.text

    def test_every_arm_has_a_row_and_every_table_its_columns(self, page, folder):
        for summary in summaries(folder):
            for arm in summary.arms.values():
                cell = f"{100 * arm.mean():.1f} ± {100 * arm.std():.1f}"
                assert any(cell in row for row in page.rows if row[0].startswith(arm.arm.title))
        assert "occlusion" in page.text

    def test_says_how_to_get_it_again(self, page):
        assert "kdfast experiments run" in page.text
        assert any(row[0] == "commit" for row in page.rows)


class TestSummary:
    experiment = EXPERIMENTS["few-labels-digits"]
    scores = {"no_kd": [0.80, 0.81, 0.79, 0.80], "kd": [0.90, 0.92, 0.88, 0.90], "smoothing": [0.70, 0.72, 0.69, 0.70]}  # noqa: RUF012

    def test_verdicts_reach_the_page(self):
        found = summarise(self.experiment, runs(self.scores))
        page = Page(html([found]))
        row = next(row for row in page.rows if row[0] == "KD, labelled images" and "helps" in row)
        assert row[1:5] == ["90.0 ± 1.6", "+10.0 ± 0.8", "< .001", "helps"]
        assert any(row[0] == "label smoothing" and "hurts" in row for row in page.rows)
        listed = next(row for row in page.rows if row[0].endswith("labelled: no KD"))
        assert listed[1:] == ["KD, labelled images", "", "label smoothing"]

    def test_bounds_are_shown_and_not_compared(self):
        found = summarise(self.experiment, runs({**self.scores, "all_labels": [0.96] * 4}))
        assert found.arms["all_labels"].comparisons == {}
        assert "upper bound" in html([found])

    def test_only_the_last_settings_and_options_count(self):
        old = runs({"no_kd": [0.1] * 6, "kd": [0.1] * 6}, settings="old")
        tried = runs({"no_kd": [0.2] * 4}, stage=TUNING)
        first = runs({"no_kd": [0.3] * 4}, options={"a": 1})
        found = summarise(self.experiment, [*old, *tried, *first, *runs(self.scores)])
        assert found.arms["no_kd"].mean() == pytest.approx(0.80)
        assert found.tuning_runs == 4

    def test_two_seeds_are_shown_without_a_verdict(self):
        found = summarise(self.experiment, runs({name: values[:2] for name, values in self.scores.items()}))
        assert found.arms["kd"].comparisons == {}
        Page(html([found]))

    def test_one_seed_has_no_spread(self):
        found = summarise(self.experiment, runs({name: values[:1] for name, values in self.scores.items()}))
        page = Page(html([found]))
        assert "1 seed;" in page.text
        assert "1 seeds" not in page.text
        assert any(row[:2] == ["KD, labelled images", "90.0"] for row in page.rows)
        assert "± 0.0" not in page.text


class TestLanguage:
    def test_gain_is_the_loss_below_that_of_no_kd(self, tmp_path):
        students = [
            {"arm": arm, "seed": seed, "epochs": 4, "ce": loss + seed / 100 * (arm == "dense")}
            for arm, loss in (("none", 6.0), ("dense", 5.5), ("sample-10", 5.7))
            for seed in range(3)
        ]
        (tmp_path / "frontier-students.jsonl").write_text("\n".join(map(json.dumps, students)))
        none, dense = language_rows(tmp_path)
        assert (none.cross_entropy, none.comparison) == (6.0, None)
        assert dense.comparison.difference == pytest.approx(0.49)
        assert dense.comparison.verdict == "helps"
        found = summarise(TestSummary.experiment, runs(TestSummary.scores))
        assert "+0.490 ± 0.010" in html([found], [none, dense])

    def test_another_file_is_named(self, tmp_path):
        (tmp_path / "frontier-students.jsonl").write_text("[]\n")
        with pytest.raises(ResultsError, match=r"frontier-students\.jsonl is no file of students"):
            language_rows(tmp_path)
        assert language_rows(tmp_path / "absent") == []


class TestCommand:
    def invoke(self, *arguments):
        return testing.CliRunner().invoke(app, ["experiments", *map(str, arguments)])

    def test_report_and_list(self, folder, tmp_path):
        result = self.invoke("report", "--out", folder, "--page", tmp_path / "new" / "page.html")
        assert result.exit_code == 0, result.output
        Page((tmp_path / "new" / "page.html").read_text("utf-8"))
        result = self.invoke("list", "--out", folder)
        assert result.exit_code == 0, result.output
        assert all(name in result.output for name in EXPERIMENTS)

    def test_no_results_say_how_to_get_some(self, tmp_path):
        result = self.invoke("report", "--out", tmp_path)
        assert result.exit_code == 1
        assert "holds no finished run" in result.output

    def test_unknown_experiments_are_refused(self, tmp_path):
        result = self.invoke("run", "nonsense", "--out", tmp_path)
        assert result.exit_code == 2
        assert "few-labels-digits" in result.output

    def test_a_file_in_use_is_named(self, tmp_path):
        with Store(file_of(tmp_path, "label-noise")):
            result = self.invoke("run", "label-noise", "--quick", "--out", tmp_path)
        assert result.exit_code == 1
        assert "being written by another process" in result.output
