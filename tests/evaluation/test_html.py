import json
import re
import shutil
import subprocess
import sys
from html import escape
from html.parser import HTMLParser

import pytest

from nsa_convert.errors import MachineError
from nsa_convert.evaluation.report.html import render_html, write_html
from nsa_convert.evaluation.report.plots import plots_of, write_plots
from nsa_convert.evaluation.report.verdict import task_rows, verdict, wilson
from tests.evaluation.samples import sample_report, summary, text

PLOTS = ["needles", "perplexity", "kl", "layers", "gates", "speed", "cache"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# Runs in a copy of the page: what a reader would notice.
PROBE = """<script>
addEventListener("load", () => {
  const seen = [...document.querySelectorAll("figure svg")].map(svg => {
    const box = svg.getBoundingClientRect(), shapes = svg.querySelectorAll("path, use, text").length;
    return box.width > 100 && box.height > 80 && shapes > 10;
  });
  const wide = document.documentElement.scrollWidth > innerWidth;
  const font = parseFloat(getComputedStyle(document.body).fontSize);
  const page = getComputedStyle(document.body).backgroundColor;
  parent.document.title = JSON.stringify({drawn: seen, wide, font, page, width: innerWidth});
});
</script></body>"""


@pytest.fixture(scope="module")
def page():
    return render_html(sample_report())


def test_the_page_shows_everything_the_report_holds(page):
    report = sample_report()
    assert [plot.name for plot in plots_of(report)] == PLOTS
    assert re.findall(r'<section id="(\w+)">', page) == PLOTS
    assert page.count("<figure") == page.count("<svg") == 2 + 2 + 2 + 2 + 2 + 2 + 1
    assert verdict(report) in page.replace("&#39;", "'")
    assert page.count("nsa-convert eval tiny-nsa --suite long") == len(PLOTS) + 4
    assert "niah_single_1" in page
    assert "75%" in page


def test_the_page_is_one_file_without_scripts_or_requests(page):
    assert re.findall(r"""(?:src|href)\s*=\s*["'](?!#)(?!data:)[^"']*""", page) == []
    assert re.findall(r"url\((?!#)", page) == []
    assert "@import" not in page
    assert "<script" not in page
    outside = [a for a in re.findall(r"https?://[^\s\"'<]+", page) if not a.startswith("http://www.w3.org/")]
    assert outside == []


def test_ids_are_unique_and_references_resolve(page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(ids)


def test_tags_balance_and_texts_are_escaped(page):
    class Reader(HTMLParser):
        stack: list = []

        def handle_starttag(self, tag, attrs):
            if tag not in {"meta", "br", "img"}:
                self.stack.append(tag)

        def handle_endtag(self, tag):
            assert self.stack.pop() == tag

    reader = Reader()
    reader.feed(page)
    assert reader.stack == []
    assert "a warning with &lt;tags&gt; &amp; signs" in page
    assert "<b>" not in render_html(sample_report("<b>evil</b>"))


def test_parts_without_data_are_left_out():
    report = {**sample_report(), "needles": {}, "tasks": [], "speed": []}
    report["texts"] = [{**text("code"), "layers": []}]
    assert [plot.name for plot in plots_of(report)] == ["perplexity", "kl"]
    page = render_html(report)
    assert "Needles" not in page
    assert "Scores by task" not in page


def test_plots_become_png_files(tmp_path):
    written = write_plots(sample_report(), tmp_path)
    assert [path.stem for path in written] == PLOTS
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written)


def test_without_jinja_the_pip_line_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MachineError, match="jinja2") as caught:
        write_html(sample_report(), tmp_path)
    assert caught.value.hint == "pip install matplotlib jinja2"


def test_the_verdict_has_two_sentences_with_numbers():
    said = verdict(sample_report())
    assert len(re.findall(r"\.(?:\s|$)", said)) == 2
    assert "x1.250 on code" in said
    assert "KL 0.1250" in said
    # Beyond the budget are 12 needles, 8 of them found, and 16 task cases, 12 of them right.
    assert "In 28 retrieval cases beyond the budget it scores 71.4%" in said
    report = {**sample_report(), "needles": {}, "tasks": [], "speed": []}
    assert "were not measured" in verdict(report)
    short = {**report, "texts": [{**text("code"), "tokens": 1000, "beyond": summary(1.0)}]}
    assert "nothing sparse was measured" in verdict(short)
    assert "No layer of this model is sparse" in verdict({**report, "visible_budget": None})


def test_scores_by_task_keep_dense_and_sparse_apart():
    rows = {(row["task"], row["length"]): row for row in task_rows(sample_report())}
    assert rows["vt, free", 4096]["dense"]["score"] == 1
    assert rows["vt, free", 4096]["sparse"]["score"] == 0.75
    assert rows["needle, forced", 8192]["sparse"]["n"] == 4


@pytest.mark.parametrize(
    ("hits", "cases", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962), (0, 0, 0, 1)],
)
def test_wilson_interval(hits, cases, low, high):
    assert wilson(hits, cases) == pytest.approx((low, high), abs=1e-4)


def chromium(folder, page, width, *options):
    """Open the page in a frame: a headless window cannot be as narrow as a phone."""
    path = folder / "page.html"
    frame = f'<iframe style="border: 0" width="{width}" height="900" srcdoc="{escape(page)}"></iframe>'
    head = '<meta charset="utf-8"><meta name="color-scheme" content="light dark">'
    path.write_text(f'{head}<body style="margin: 0">{frame}</body>')
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        *options,
        path.as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_draws_every_figure_within_the_width(tmp_path, page, width, dark):
    options = ["--window-size=1300,900", "--virtual-time-budget=2000", "--dump-dom"]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = chromium(tmp_path, page.replace("</body>", PROBE), width, *options)
    assert "CONSOLE" not in done.stderr
    found = json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1].replace("&quot;", '"'))
    assert found["width"] == width
    assert found["drawn"] == [True] * 13
    assert found["wide"] is False
    assert found["font"] >= 16
    assert (found["page"] == "rgb(14, 17, 22)") is dark
