"""The page in a browser, and what a stranger's folder may put into it."""

import itertools
import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from tests.report.browser import SIZES, chromium, opened
from vitoats.cli import common
from vitoats.cli.report import main as report
from vitoats.report.page.document import Chart, Facts, Passage, Section, Table
from vitoats.report.page.page import render, spec_json

HOSTILE = "</script><script>document.title='hacked'</script><img src=x onerror=alert(1)>"
FRONT = [
    {"method": "dense", "weights": "float32", "compression": 0.0, "top1": 87.8, "ms": 19.1, "bytes": 72104999},
    {"method": "int8", "weights": "int8", "compression": 0.0, "top1": 87.3, "ms": 5.1, "bytes": 19215230},
    {"method": "oats-h", "weights": "float32", "compression": 0.5, "top1": 87.1, "ms": 15.7, "bytes": 38866812},
    {"method": "oats-h", "weights": "float32", "compression": 0.6, "top1": 86.9, "ms": 13.7, "bytes": 31758195},
]


@pytest.fixture(scope="module")
def made(tiny_folder, plain, flat_images, tmp_path_factory):
    """A folder whose names are hostile, its page, and the JSON line."""
    root = tmp_path_factory.mktemp("report")
    folder = root / "run"
    shutil.copytree(plain, folder)
    about = json.loads((folder / "vitoats.json").read_text())
    (folder / "vitoats.json").write_text(json.dumps(about | {"model": HOSTILE, "method": "oats"}))
    (folder / "front.jsonl").write_text("".join(json.dumps(row | {"model": HOSTILE}) + "\n" for row in FRONT))
    page = root / "page.html"
    flags = [folder, "--dense", f"local-dir:{tiny_folder}", "--data-dir", flat_images, "--num-images", 2, "-o", page, "--quiet"]
    assert common.run(report, [str(flag) for flag in flags]) == 0
    return page


class Reader(HTMLParser):
    """The tags of a page with their attributes, and all that they refer to."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "srcset", "data")]


def test_the_page_refers_to_nothing_outside_it(made):
    read = Reader(made.read_text())
    assert read.addresses
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in read.addresses)
    assert "default-src 'none'" in next(tag["content"] for name, tag in read.tags if name == "meta" and "http-equiv" in tag)


def test_names_in_files_are_shown_as_text(made):
    read = Reader(made.read_text())
    assert [tag.get("type") for name, tag in read.tags if name == "script"].count(None) == 2  # the page's own
    assert not [tag for name, tag in read.tags if name == "img" and "onerror" in tag]
    assert "&lt;img src=x onerror=alert(1)&gt;" in made.read_text()


def test_headings_are_in_order_and_pictures_have_words(made):
    read = Reader(made.read_text())
    levels = [int(name[1]) for name, _ in read.tags if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below <= above + 1 for above, below in itertools.pairwise(levels))
    assert all(tag["alt"] for name, tag in read.tags if name == "img")
    assert all(tag["aria-label"] for _, tag in read.tags if tag.get("role") in ("img", "region"))
    assert next(tag for name, tag in read.tags if name == "html")["lang"] == "en"


def test_the_same_folder_gives_the_same_page(made, tiny_folder, flat_images, tmp_path):
    flags = [made.parent / "run", "--dense", f"local-dir:{tiny_folder}", "--data-dir", flat_images, "--num-images", 2]
    assert common.run(report, [str(flag) for flag in [*flags, "-o", tmp_path / "again.html", "--quiet"]]) == 0
    assert (tmp_path / "again.html").read_bytes() == made.read_bytes()


def test_a_browser_draws_all_charts_without_complaint_at_every_size(made):
    with chromium() as browser:
        for width in SIZES:
            for scheme in ("light", "dark"):
                with opened(browser, made, width, scheme) as page:
                    assert page.said == []
                    assert all(url.startswith(("file:", "data:")) for url in page.asked)
                    assert page.title() != "hacked"
                    assert page.evaluate("document.documentElement.scrollWidth") <= width
                    assert page.locator(".chart").count() >= 8
                    assert page.locator(".chart svg").count() == page.locator(".chart").count()
                    sizes = page.evaluate("[...document.querySelectorAll('.chart svg')].map(svg => svg.clientWidth)")
                    assert all(width / 5 < drawn <= width for drawn in sizes)
                    broken = "[...document.images].filter(image => !image.naturalWidth).length"
                    assert page.evaluate(broken) == 0


def test_charts_follow_the_colours_of_the_system(made):
    axis = "getComputedStyle(document.querySelector('.chart svg text')).fill"
    with chromium() as browser, opened(browser, made, scheme="light") as page:
        light = page.evaluate(axis)
        page.evaluate("delete document.documentElement.dataset.drawn")
        page.emulate_media(color_scheme="dark")
        page.wait_for_selector("html[data-drawn]", state="attached")
        assert page.evaluate(axis) != light


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them(made, scheme):
    """Contrast of at least 4.5 (WCAG AA) for every text outside charts and pictures."""
    with chromium() as browser, opened(browser, made, scheme=scheme) as page:
        low = page.evaluate(
            """() => {
              const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
              const linear = (v) => (v /= 255, v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
              const light = (c) => { const [r, g, b] = rgb(c).map(linear);
                                     return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
              const behind = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
                                      if ((rgb(c)[3] ?? 1) === 1) return c; } return "rgb(255, 255, 255)"; };
              return [...document.querySelectorAll("body *")].filter((e) => !e.closest("svg, script, .skip")
                && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())).map((e) => {
                const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
                return [(a + 0.05) / (b + 0.05), e.tagName, e.textContent.slice(0, 40)]; }).filter(([ratio]) => ratio < 4.5);
            }"""
        )
    assert low == []


def test_the_keyboard_reaches_the_tables(made):
    with chromium() as browser, opened(browser, made) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        details = page.locator("details").first
        details.locator("summary").focus()
        page.keyboard.press("Enter")
        assert details.evaluate("d => d.open")


def test_a_specification_cannot_end_its_element():
    chart = Chart("t", "a", {"data": {"values": [{"name": HOSTILE}]}}, Table("c", ["a"], []))
    assert "<" not in spec_json(chart)
    assert json.loads(spec_json(chart))["data"]["values"][0]["name"] == HOSTILE


def test_every_kind_of_part_escapes_its_texts():
    parts = [
        Table(HOSTILE, [HOSTILE], [[HOSTILE]]),
        Facts([(HOSTILE,) * 3]),
        Passage(HOSTILE, [(HOSTILE, 0.5, HOSTILE)], HOSTILE),
        Chart(HOSTILE, HOSTILE, {"title": HOSTILE}, Table(HOSTILE, [HOSTILE], [[HOSTILE]])),
    ]
    read = Reader(render(HOSTILE, HOSTILE, [Section("s", HOSTILE, HOSTILE, parts)]))
    assert "img" not in {name for name, _ in read.tags}
    assert len([name for name, _ in read.tags if name == "script"]) == 3  # one of them is the chart's data
