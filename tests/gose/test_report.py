import html.parser
import itertools
import re
import statistics
import xml.etree.ElementTree as ElementTree

import pytest

from gose import report
from gose.report import Figure, svg
from gose.report.text import byte_count, over_seeds, percent, plain, quantity
from tests.gose import fake_run

ROWS = fake_run.rows()
VOID = {"meta", "br"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fake_run.write(tmp_path_factory.mktemp("runs") / "run", ROWS)


@pytest.fixture(scope="module")
def parts(run):
    return {part.title: part for part in report.read(run).parts}


class Page(html.parser.HTMLParser):
    """Fails on a tag that is not closed in order; collects tags, attributes, cells and texts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def kind(name, **wanted):
    return [
        row
        for row in ROWS
        if row["kind"] == name and all(row[key] == value for key, value in wanted.items())
    ]


def cells(table, first):
    return next(row for row in table.rows if row[0] == first)


def test_page_stands_alone(run):
    report.write(run)
    text = (run / "report.html").read_text()
    page = Page(text)
    assert "://" not in text
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not {"src", "href", "xlink:href", "action"} & {name for name, _ in page.attributes}
    assert "url(" not in text
    assert "@import" not in text
    assert len(page.open) == 0


def test_figures_are_well_formed_and_inside_their_frame(run):
    figures = [
        image
        for part in report.read(run).parts
        for block in part.blocks
        if isinstance(block, Figure)
        for image in block.images
    ]
    assert len(figures) == len(fake_run.ARMS) + 4
    for image in figures:
        root = ElementTree.fromstring(image)
        width, height = float(root.get("width")), float(root.get("height"))
        assert root.get("viewBox") == f"0 0 {width:.0f} {height:.0f}"
        for element in root.iter():
            for key, limit in (("x", width), ("cx", width), ("y", height), ("cy", height)):
                if (value := element.get(key)) is not None:
                    assert 0 <= float(value) <= limit, ElementTree.tostring(element)


def test_heat_map_shows_the_mean_accuracy_over_seeds(parts):
    figure = parts["Learning the stream"].blocks[1]
    for arm, image in zip(fake_run.ARMS, figure.images, strict=True):
        hints = [e.text for e in ElementTree.fromstring(image).iter("title")]
        for i in range(4):
            for j in range(4):
                of_seeds = [r["top1"][j] for r in kind("accuracy", arm=arm, after_task=i)]
                assert len(of_seeds) == 3
                mean = f"{100 * statistics.fmean(of_seeds):.1f}"
                assert f"{arm}: after task {i + 1}, tested on task {j + 1}: {mean}" in hints
                row = next(r for r in figure.numbers.rows if r[:2] == (arm, str(i + 1)))
                assert row[2 + j] == f"{mean} %"


def test_summary_shows_mean_and_deviation_of_every_arm(parts):
    table = parts["Learning the stream"].blocks[0]
    keys = ("acc", "learning_acc", "bwt_gem", "bwt_seed", "forgetting")
    for arm in fake_run.ARMS:
        for column, key in enumerate(keys, start=1):
            values = [100 * row[key] for row in kind("summary", arm=arm)]
            mean, deviation = statistics.fmean(values), statistics.stdev(values)
            assert cells(table, arm)[column] == f"{mean:.1f} % ± {deviation:.1f} %"


def test_teacher_and_student_show_ratios_seed_by_seed(parts):
    table = parts["Teacher and student"].blocks[0]
    teachers, students = kind("teacher"), kind("student")
    shares = [s["train_flops"] / t["train_flops"] for s, t in zip(students, teachers, strict=True)]
    assert cells(table, "student / teacher")[3].startswith(
        f"{100 * statistics.fmean(shares):.1f} %"
    )
    shares = [s["top1"] / t["top1"] for s, t in zip(students, teachers, strict=True)]
    assert cells(table, "student / teacher")[1].startswith(
        f"{100 * statistics.fmean(shares):.1f} %"
    )
    assert cells(table, "teacher")[3] == "123 G ± 1"
    mean = statistics.fmean(s["scratch_top1"] for s in students)
    assert table.rows[-1][1].startswith(percent(mean))
    assert table.rows[-1][3] == "35.0 G"
    agreement = parts["Teacher and student"].blocks[1]
    assert cells(agreement, "1")[1:] == tuple(percent(v) for v in students[1]["agreement"])


def test_routing_is_of_the_configured_arm_alone(parts):
    table, figure = parts["Routing"].blocks
    rows = kind("routing", arm="main", mode="egs")
    assert cells(table, "egs")[1].startswith(percent(statistics.fmean(r["top1"] for r in rows)))
    assert cells(table, "egs")[2] == "413 k ± 1.00 k"
    assert cells(table, "egs")[3] == f"{100 * 413_000 / 1_021_000:.1f} %"
    hints = [e.text for e in ElementTree.fromstring(figure.images[0]).iter("title")]
    for row in rows:
        exact = f"egs, one seed: {quantity(row['flops_per_input'])}, {percent(row['top1'])}"
        assert exact in hints


def test_bytes_are_those_of_the_summary(parts):
    table = parts["Sites"].blocks[0]
    assert cells(table, "main")[1:4] == ("5.24 MB", "19.8 MB", f"{1_234_567 / 327_680:.2f}")
    assert cells(table, "codec=none")[3] == "1.00"
    assert cells(table, "merge=none")[1:4] == ("0 B", "0 B", "–")


def test_rounds_show_merged_and_best_site(parts):
    figure = parts["Sites"].blocks[2]
    rows = kind("round", arm="main", task=2, round=3)
    shown = next(row for row in figure.numbers.rows if row[:2] == ("3", "4"))
    assert shown[2] == percent(statistics.fmean(row["merged_top1"] for row in rows))
    assert shown[3] == percent(statistics.fmean(max(row["site_top1"]) for row in rows))


def test_sites_that_stay_alone_have_rounds_without_a_merged_graph(tmp_path):
    rows = [row | {"merged_top1": None} if row["kind"] == "round" else row for row in ROWS]
    path = fake_run.write(tmp_path / "run", rows)
    [figure] = [
        block
        for part in report.read(path).parts
        for block in part.blocks
        if isinstance(block, Figure) and block.title.startswith("Merged graph")
    ]
    assert {row[2] for row in figure.numbers.rows} == {"–"}
    best = statistics.fmean(
        max(row["site_top1"]) for row in kind("round", arm="main", task=0, round=0)
    )
    assert figure.numbers.rows[0][3] == percent(best)


def test_entropy_starts_when_a_module_exists(parts):
    (figure,) = parts["Entropy of the modules"].blocks
    row = cells(figure.numbers, "expert.digits")
    assert row[1:3] == ("–", "–")
    last = [r["modules"]["expert.digits"] for r in kind("entropy", arm="main", after_task=3)]
    assert row[4] == f"{statistics.fmean(last):.4f}"


def test_claims_counters_and_times(parts):
    (claims,) = parts["Claims"].blocks
    assert [row[:3] for row in claims.rows][1] == ("student's training FLOPs", "<= 0.6", "0.37")
    assert claims.rows[-1][3:5] == ("✗ does not hold", "-0.0031, -0.0031, -0.0031")
    (counters,) = parts["Kernels"].blocks
    combine = kind("counters", op="combine")[0]
    assert cells(counters, "combine")[1:4] == (
        "cpu",
        f"{combine['calls']:,}",
        quantity(combine["tokens"]),
    )
    (times,) = parts["Time"].blocks
    total = 0.37 * sum(range(fake_run.TOTAL))
    assert cells(times, "all")[1:3] == (str(fake_run.TOTAL), f"{total:.1f} s")


def test_markdown_holds_every_number_of_the_tables(run):
    text = report.markdown(report.read(run)).replace("\\", "")
    for part in report.read(run).parts:
        for block in part.blocks:
            table = block.numbers if isinstance(block, Figure) else block
            for row in table.rows if table else ():
                assert "| " + " | ".join(" ".join(cell.split()) for cell in row) + " |" in text


def test_an_unfinished_run_has_a_report(tmp_path):
    for count in (0, 1, 2, 3, 8, 40):
        path = fake_run.write(tmp_path / str(count), ROWS[:count], done=7)
        report.write(path)
        assert "unfinished: 7 of 40 units" in (path / "report.html").read_text()
        Page((path / "report.html").read_text())


def test_names_cannot_break_the_page(tmp_path):
    evil = '</title><script>alert("1")</script> | `x` & <b>'
    rows = [
        {
            **row,
            **({"arm": evil} if "arm" in row else {}),
            **({"note": evil} if "note" in row else {}),
        }
        for row in fake_run.rows(seeds=(0,), arms=("main",))
    ]
    path = fake_run.write(tmp_path / "<i>run", rows)
    text = report.html(report.read(path))
    assert not {"script", "b", "i"} & set(Page(text).tags)
    lines = report.markdown(report.read(path)).splitlines()
    assert (
        len({len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("| student")})
        == 2
    )


def test_numbers_as_people_read_them():
    whole = {0: "0", 7: "7", 999.4: "999", 999.6: "1.00 k", 1234: "1.23 k", 99_949: "99.9 k"}
    large = {99_951: "100 k", 999_499: "999 k", 999_501: "1.00 M", 2.5e15: "2.50 P", 4e18: "4000 P"}
    for value, text in (whole | large).items():
        assert quantity(value) == text
    assert quantity(-1234) == "-1.23 k"
    assert byte_count(5_242_880) == "5.24 MB"
    assert byte_count(12) == "12 B"
    assert over_seeds([], percent) == "–"
    assert over_seeds([None, 0.5], percent) == "50.0 %"
    assert over_seeds([0.4, 0.6], percent) == "50.0 % ± 14.1 %"
    assert plain([0.123456, True, None, {"a": 1}]) == "0.1235, yes, –, a 1"


def test_lines_put_points_where_the_numbers_say():
    image = svg.lines(
        {"one": [(1, 0.0), (2, 0.5), (3, 1.0)]},
        x_label="x",
        y_label="y",
        y_form=str,
        x_ticks={1: "1"},
        y_range=(0.0, 1.0),
    )
    line = next(ElementTree.fromstring(image).iter("polyline")).get("points")
    (x1, y1), (x2, y2), (x3, y3) = (map(float, pair.split(",")) for pair in line.split())
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.11)
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.11)
    assert y1 > y3


def test_labels_of_ends_do_not_overlap():
    image = svg.lines(
        {name: [(0, 0.5), (1, 0.5)] for name in "abcdefgh"},
        x_label="x",
        y_label="y",
        y_form=str,
        x_ticks={},
    )
    texts = [e for e in ElementTree.fromstring(image).iter("text") if e.text in set("abcdefgh")]
    heights = sorted(float(e.get("y")) for e in texts)
    assert len(heights) == 8
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 14.9
