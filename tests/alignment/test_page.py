"""report.html: what it shows is what the report says, and nothing that a client wrote acts on it.

The browser tests need Chromium and playwright; where one is missing, `helpers.browser` skips them or has them fail.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from clairlib.alignment import page as alignment_page
from clairlib.alignment.page import write_alignment_page
from helpers.browser import chromium

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    "\"><svg onload='alert(3)'>",
    "&lt;b&gt;",
]


def report_of(clients: list[str], modules: list[str]) -> dict[str, Any]:
    """A report as `clair align` writes it: every third client contaminated, the first one's score missing."""
    return {
        "clients": [
            {
                "name": name,
                "contaminated": k % 3 == 2,
                "score": None if k == 0 else (9.5 + k if k % 3 == 2 else -0.5 * k),
                "p_value": None if k == 0 else 10.0 ** -(1 + k % 3),
                "modules": {module: 20.0 if k % 3 == 2 else -0.25 * k for module in modules},
            }
            for k, name in enumerate(clients)
        ],
        "modules": [
            {
                "name": module,
                "shape": [64, 48],
                "rank": 2,
                "shared_structure": 0.05 + 0.5 * (j == 0),
                "estimated_gain": 0.5 - j,
                "refined": j == 0,
                "truncation_error": {"max": 0.125, "mean": 0.0625},
                "spectrum": [4.0, 3.0, 1.0, 0.5],
            }
            for j, module in enumerate(modules)
        ],
        "settings": {"rank": None, "solver": HOSTILE[0]},
        "provenance": {"versions": {HOSTILE[1]: "1.0"}, "time": "2026"},
    }


NAMES = [*HOSTILE, "ada", "bob", "client_10", "client_9"]
MODULES = [HOSTILE[0], "layers.0.o_proj"]


class Parsed(HTMLParser):
    """Elements (tag, attributes, text) of a page, text of all of it, cells of its first table."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.titles: list[str] = []
        self.cells: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if "td" in self.open and "title" not in self.open:
            self.cells[-1] += data
        if self.open[-1:] == ["title"]:
            self.titles.append(data)


def written(tmp_path: Path, report: dict[str, Any]) -> Parsed:
    write_alignment_page(report, tmp_path / "report.html")
    return Parsed((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_names_stay_text_and_nothing_is_loaded_or_handled(tmp_path: Path) -> None:
    page = written(tmp_path, report_of(NAMES, MODULES))
    assert not page.open  # every element is closed in order
    assert {tag for tag, _ in page.elements} <= set(
        "html head meta title style body h1 h2 p strong table thead tbody tr th td dl dt dd figure figcaption svg g "
        "path rect circle polyline text script".split()
    )
    used = {name for _, attributes in page.elements for name in attributes}
    assert not {name for name in used if name.startswith("on") or name in ("src", "href", "style", "xlink:href")}
    assert [tag for tag, _ in page.elements].count("script") == 1
    for name in NAMES:
        assert name in page.cells and any(title.startswith(f"{name}, ") for title in page.titles)
    assert {HOSTILE[0], f"versions: {HOSTILE[1]}"} <= set(page.text)


def test_tables_say_what_the_report_says(tmp_path: Path) -> None:
    page = written(tmp_path, report_of(NAMES, MODULES))
    verdict, modules = page.cells[: 5 * len(NAMES)], page.cells[5 * len(NAMES) :]
    rows = [verdict[place : place + 5] for place in range(0, len(verdict), 5)]
    assert rows[0] == ["bob", "contaminated", "14.5", "0.001", "-"]  # by score, the highest first
    assert rows[-1] == [NAMES[0], "benign", "-", "-", "-"]
    assert modules[:8] == [MODULES[0], "64 × 48", "2", "0.55", "0.5", "yes", "0.125", ""]
    assert modules[8:] == [MODULES[1], "64 × 48", "2", "0.05", "-0.5", "no", "0.125", ""]
    text = "".join(page.text)
    assert "8 clients: 6 benign, 2 contaminated." in text and "in 1 of 2 modules" in text
    assert "No shared subspace" not in text


def test_heat_map_has_a_titled_cell_for_every_module_and_client(tmp_path: Path) -> None:
    page = written(tmp_path, report_of(NAMES, MODULES))
    cells = [attributes for tag, attributes in page.elements if tag == "rect" and "fill" in attributes]
    assert len(cells) == len(NAMES) * len(MODULES)
    assert {f"{name}, {module}: {'20' if k % 3 == 2 else f'{-0.25 * k:.3g}'}" for module in MODULES
            for k, name in enumerate(NAMES)} <= set(page.titles)  # fmt: skip
    assert sum(cell["fill"] == "#d55e00" for cell in cells) == 2 * len(MODULES)
    widest = max(float(cell["x"]) + float(cell["width"]) for cell in cells)
    assert widest <= float(next(a for t, a in page.elements if t == "svg" and a.get("aria-label") == HEAT)["width"])


HEAT = "Scores by module and client"


def test_many_clients_are_cut_to_those_with_the_highest_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment_page, "MOST_CELLS", 7)
    page = written(tmp_path, report_of(NAMES, MODULES))
    titles = {title for title in page.titles if title.endswith(f", {MODULES[1]}: 20")}
    assert titles == {f"{NAMES[k]}, {MODULES[1]}: 20" for k in (2, 5)}
    assert sum(tag == "rect" and "fill" in attributes for tag, attributes in page.elements) == 3 * len(MODULES)
    assert "3 clients with the highest scores of 8" in "".join(page.text)


@pytest.mark.parametrize("report", [{}, {"clients": [{}], "modules": [{}]}, {"clients": [{"name": "a", "score": 1.0}]}])
def test_missing_keys_are_left_out(tmp_path: Path, report: dict[str, Any]) -> None:
    assert not written(tmp_path, report).open


def test_little_structure_is_said_and_a_lone_surrogate_can_be_written(tmp_path: Path) -> None:
    report = report_of(["a", "b\udcff", "c"], ["m"])
    report |= {"shared": False, "remarks": ["a and <c> sent nearly the same update"]}
    report["clients"][0] |= {"verdict": "cannot tell", "smallest_deviation": 2.5}
    page = written(tmp_path, report)
    assert "Nothing shared found" in "".join(page.text) and "1 cannot tell" in "".join(page.text)
    assert "a and <c> sent nearly the same update" in page.text and {"cannot tell", "2.5"} <= set(page.cells)


def test_colours_are_those_of_the_plots(tmp_path: Path) -> None:
    from clairlib.plots import BENIGN, CONTAMINATED, NEUTRAL

    style = alignment_page.STYLE.read_text()
    for name, colour in (("benign", BENIGN), ("contaminated", CONTAMINATED), ("neutral", NEUTRAL)):
        assert f"svg .{name} {{ fill: {colour}; }}" in style
    ends = [alignment_page.score_colour(score) for score in (-99.0, 0.0, 99.0)]
    assert ends == [BENIGN, "#f7f7f7", CONTAMINATED]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as launched:
        yield launched


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """The page opened; ``page.seen`` has what it said, asked for and did wrong."""
    write_alignment_page(report_of(NAMES, MODULES), tmp_path / "report.html")
    opened = browser.new_page()
    opened.seen = []
    opened.on("console", lambda message: opened.seen.append(message.text))
    opened.on("pageerror", lambda error: opened.seen.append(str(error)))
    opened.on("dialog", lambda dialog: (opened.seen.append(dialog.message), dialog.dismiss()))
    opened.on("request", lambda request: opened.seen.append(request.url))
    opened.goto((tmp_path / "report.html").as_uri())
    assert opened.seen.pop(0) == (tmp_path / "report.html").as_uri()
    yield opened
    opened.close()


def column(page: Any, place: int) -> list[str]:
    return page.locator(f"table >> nth=0 >> tbody tr td:nth-child({place})").all_inner_texts()


def test_browser_opens_it_in_silence_and_names_stay_text(page: Any) -> None:
    assert set(column(page, 1)) == set(NAMES)
    assert page.locator("img, script + script").count() == 0
    page.locator(".cells rect").first.hover()
    assert page.seen == []


def test_browser_sorts_both_ways_by_mouse_and_keyboard(page: Any) -> None:
    scores = [client["score"] for client in report_of(NAMES, MODULES)["clients"]]
    known = sorted(score for score in scores if score is not None)
    shown = [f"{score:.3g}" for score in known]
    head = page.locator("th", has_text="score").first
    assert column(page, 3) == [*reversed(shown), "-"] and head.get_attribute("aria-sort") == "descending"
    head.locator("button").click()
    assert column(page, 3) == [*shown, "-"] and head.get_attribute("aria-sort") == "ascending"
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert column(page, 3) == [*reversed(shown), "-"] and head.get_attribute("aria-sort") == "descending"
    page.locator("th", has_text="client").first.locator("button").click()
    assert head.get_attribute("aria-sort") is None
    names = column(page, 1)
    assert names.index("ada") < names.index("bob") < names.index("client_9") < names.index("client_10")
    assert column(page, 2)[names.index("bob")] == "contaminated"
    assert page.seen == []


def test_browser_runs_nothing_even_if_markup_got_in(page: Any) -> None:
    page.evaluate(f"document.body.insertAdjacentHTML('beforeend', {json.dumps(HOSTILE[0])})")
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {textContent: 'alert(2)'}))")
    page.wait_for_timeout(200)
    attempts = [seen for seen in page.seen if not seen.startswith("file:")]  # the request of an image that is refused
    assert len(attempts) == 3 and all(seen.endswith("The action has been blocked.") for seen in attempts)


def test_browser_without_scripts_shows_everything_but_sorting(browser: Any, tmp_path: Path) -> None:
    write_alignment_page(report_of(NAMES, MODULES), tmp_path / "report.html")
    opened = browser.new_context(java_script_enabled=False).new_page()
    opened.goto((tmp_path / "report.html").as_uri())
    assert opened.locator("tbody tr").count() == len(NAMES) + len(MODULES)
    assert opened.locator("th button").count() == 0 and opened.locator(".cells rect").count() == 16
    assert opened.locator("th", has_text="score").first.is_visible()
    assert re.search("settings", opened.content(), re.IGNORECASE)
    opened.context.close()
