"""report.html: the report of an alignment as one page. It needs no network, and JavaScript only for sorting.

Names come from clients that may be hostile. Text becomes markup in `_tag` alone, which escapes it, and the page's
content security policy runs no script but the page's own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from scipy import stats

from clairlib.recovery import result as verdicts
from clairlib.recovery.detection import PRIOR_CLIENTS
from clairlib.recovery.leave_one_out import MIN_EXPLAINED_VARIANCE

WIDTH = 1000  # pixels
MOST_CELLS = 20_000  # of the heat map; more make a browser slow, so only the clients with the highest scores are shown
HOT = 10.0  # scores of at least this size have the full colour
LINEAR = 5.0  # larger scores are drawn on a logarithmic scale
TICKS = (-100, -50, -20, -10, -5, -2, 0, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10_000)
BENIGN, MIDDLE, CONTAMINATED = (0, 114, 178), (247, 247, 247), (213, 94, 0)
SHORT = 26  # characters of a name beside a heat map; the full name is in the tooltip
STYLE, SCRIPT = (Path(__file__).with_name(f"page.{kind}") for kind in ("css", "js"))
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width">
<title>CLAIR report</title>
<style>{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""


VERDICT = (
    "Contaminated: the client does not share the subspace and the common part of the benign clients; this does not "
    "say that it is malicious. Score: how far a client stands above the benign clients, in standard deviations. "
    "p-value: the chance that a benign client's score is at least as high. Seen from: the smallest deviation, in "
    "multiples of the client's own size, that would have been found half of the time; above 1 nothing can be told."
)


class _Markup(str):
    """HTML or SVG that is already escaped."""


def write_alignment_page(report: dict[str, Any], path: Path) -> None:
    """Write the report of ``clair align`` (the content of report.json) as a page; missing keys are left out."""
    style, script = STYLE.read_text(encoding="utf-8"), SCRIPT.read_text(encoding="utf-8")
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'"
    clients = list(report.get("clients", []))
    clients.sort(key=lambda client: -math.inf if client.get("score") is None else client["score"], reverse=True)
    body = "\n".join(_body(clients, report.get("modules", []), report))
    page = PAGE.format(policy=policy, style=style, body=body, script=script)
    path.write_text(page, encoding="utf-8", errors="xmlcharrefreplace", newline="\n")


def _body(clients: list[dict[str, Any]], modules: list[dict[str, Any]], report: dict[str, Any]) -> Iterator[_Markup]:
    told = [_told(client) for client in clients]
    counts = [f"{told.count(verdict)} {verdict}" for verdict in verdicts.ALL if verdict in told]
    refined = sum(bool(module.get("refined")) for module in modules)
    yield _tag("h1", "CLAIR report")
    verdict = f"{len(clients)} clients: {', '.join(counts)}."
    yield _tag("p", f"{verdict} Benign clients were refined in {refined} of {len(modules)} modules.")
    if report.get("shared") is False:
        missing = "Nothing shared found: the updates do not predict one another. Nothing can be told."
        yield _tag("p", _tag("strong", missing))
    yield _tag("h2", "Verdict")
    yield _tag("p", VERDICT)
    yield _verdict(clients)
    if report.get("remarks"):
        yield _tag("ul", *(_tag("li", str(line)) for line in report["remarks"]))
    if any(client.get("score") is not None for client in clients):
        yield _tag("h2", "Scores")
        yield _scores(clients)
    if any(client.get("modules") for client in clients):
        yield _tag("h2", "Scores by module")
        yield _heat(clients, [str(module.get("name")) for module in modules])
    yield _tag("h2", "Modules")
    yield _modules(modules)
    for title in ("settings", "provenance"):
        if report.get(title):
            yield _tag("h2", title.capitalize())
            yield _tag("dl", *_pairs(report[title]))


def _told(client: dict[str, Any]) -> str:
    return str(client.get("verdict", verdicts.CONTAMINATED if client.get("contaminated") else verdicts.BENIGN))


def _verdict(clients: list[dict[str, Any]]) -> _Markup:
    rows = []
    for client in clients:
        name, bad = _tag("td", str(client.get("name")), class_="name"), bool(client.get("contaminated"))
        verdict = _tag("td", _told(client), **({"class_": "contaminated"} if bad else {}))
        rows.append([name, verdict, *(_number(client.get(key)) for key in ("score", "p_value", "smallest_deviation"))])
    return _table(["client", "verdict", "score", "p-value", "seen from"], rows, falling="score")


def _scores(clients: list[dict[str, Any]]) -> _Markup:
    """Draw a mark for each client over the law by which benign scores are judged and a histogram of benign scores."""
    shown = [client for client in clients if client.get("score") is not None]
    benign = [client["score"] for client in shown if not client.get("contaminated")]
    low, high = min(-LINEAR, shown[-1]["score"]), max(LINEAR, shown[0]["score"])

    def across(score: float) -> float:
        return 20 + (WIDTH - 40) * (_symlog(score) - _symlog(low)) / (_symlog(high) - _symlog(low))

    marks = [_mark(client, across(client["score"]), 10 + 100 * (0.618034 * k % 1)) for k, client in enumerate(shown)]
    floor = 250
    bars = [
        _tag("rect", x=across(at), y=floor - height, width=across(at + 1) - across(at), height=height, class_="faint")
        for at in range(math.floor(low), math.ceil(high))
        if (height := 300 * sum(at <= score < at + 1 for score in benign) / max(len(benign), 1))
    ]
    law = stats.t(max(PRIOR_CLIENTS + len(benign) - 2, 1))  # each client is compared with the others, as in detection
    points = [low + (min(high, 2 * LINEAR) - low) * step / 200 for step in range(201)]
    curve = " ".join(f"{across(x):.1f},{floor - 300 * law.pdf(x):.1f}" for x in points)
    ticks = [tick for tick in TICKS if low <= tick <= high]
    labels = [_tag("text", f"{tick:g}", x=across(tick), y=floor + 16, text_anchor="middle") for tick in ticks]
    grid = _tag("path", d=" ".join(f"M{across(tick):.1f} 0V{floor + 4}" for tick in ticks), class_="axis")
    drawing = [grid, *bars, _tag("polyline", points=curve, class_="line"), *marks, *labels]
    caption = (
        "Blue circles are benign clients, vermilion diamonds contaminated ones; their height has no meaning. The curve "
        "is the distribution by which a benign client's score is judged (Student t). The grey bars are the scores of "
        f"the benign clients. The axis is logarithmic beyond {LINEAR:g}."
    )
    return _figure(_svg(drawing, WIDTH, floor + 24, "Scores of the clients"), caption)


def _mark(client: dict[str, Any], x: float, y: float) -> _Markup:
    title = _tag("title", f"{client.get('name')}: score {_show(client['score'])}, p {_show(client.get('p_value'))}")
    if client.get("contaminated"):
        return _tag("path", title, d=f"M{x:.1f} {y - 6:.1f}l5 6l-5 6l-5 -6z", class_="contaminated")
    return _tag("circle", title, cx=x, cy=y, r=4, class_="benign")


def _heat(clients: list[dict[str, Any]], modules: list[str]) -> _Markup:
    """Draw the scores by module (rows) and client (columns, by pooled score)."""
    columns = clients[: max(1, MOST_CELLS // max(len(modules), 1))][::-1]
    width = min(max((WIDTH - 200) / max(len(columns), 1), 2.0), 22.0)
    height = min(max(900 / max(len(modules), 1), 4.0), 18.0)
    bottom, right = 6 + height * len(modules), 200 + width * len(columns)
    cells = [
        _cell(client, module, 200 + width * k, 6 + height * row, width, height)
        for row, module in enumerate(modules)
        for k, client in enumerate(columns)
    ]
    names = [
        _tag("text", _shorten(module), _tag("title", module), x=194, y=height * (row + 0.5) + 10, text_anchor="end")
        for row, module in _thinned(modules, height)
    ]
    for k, client in _thinned(columns, width):
        name = str(client.get("name"))
        place = f"translate({200 + width * (k + 0.5) + 4:.1f} {bottom + 6:.1f}) rotate(-90)"
        names.append(_tag("text", _shorten(name), _tag("title", name), transform=place, text_anchor="end"))
    caption = f"Blue: below the benign clients; vermilion: above; full colour: {HOT:g} standard deviations or more."
    if len(columns) < len(clients):
        caption += f" Only the {len(columns)} clients with the highest scores of {len(clients)} are shown."
    drawing = [_tag("g", *cells, class_="cells"), *names]
    longest = min(SHORT, max(len(str(client.get("name"))) for client in columns))
    return _figure(_svg(drawing, right + 10, bottom + 12 + 6.5 * longest, "Scores by module and client"), caption)


def _cell(client: dict[str, Any], module: str, x: float, y: float, width: float, height: float) -> _Markup:
    score = (client.get("modules") or {}).get(module)
    title = _tag("title", f"{client.get('name')}, {module}: {_show(score)}")
    return _tag("rect", title, x=x, y=y, width=width, height=height, fill=score_colour(score))


def score_colour(score: float | None) -> str:
    """Return a colour of a colour-blind safe scale from blue over grey to vermilion; white if there is no score."""
    if score is None:
        return "#ffffff"
    part, end = min(abs(score) / HOT, 1.0), CONTAMINATED if score > 0 else BENIGN
    return "#" + "".join(f"{round(m + part * (e - m)):02x}" for m, e in zip(MIDDLE, end, strict=True))


def _modules(modules: list[dict[str, Any]]) -> _Markup:
    heads = ["module", "shape", "rank", "shared structure", "estimated gain", "refined", "truncation error", "spectrum"]
    table = _table(heads, [_module_row(module) for module in modules])
    caption = (
        "Shared structure: the part of a client's variation that the other clients predict, beyond chance; below the "
        f"line at {MIN_EXPLAINED_VARIANCE:g} it is next to none. Estimated gain: the part of the local squared error "
        "that refinement removes; where refinement is refused, clients keep their own updates. Truncation error: the "
        "largest among the benign clients. Spectrum: the singular values of the benign clients, blue up to the rank."
    )
    return _figure(table, caption)


def _module_row(module: dict[str, Any]) -> list[_Markup]:
    shape, refined = module.get("shape") or [], bool(module.get("refined"))
    gain, structure = module.get("estimated_gain"), module.get("shared_structure")
    kept = min(max(gain or 0.0, -1.0), 1.0)
    start = 45 * (1 + min(kept, 0.0))
    bar = _tag("rect", x=start, y=0, width=45 * abs(kept), height=12, class_="benign" if refined else "neutral")
    shared = _tag("rect", x=0, y=0, width=90 * min(max(structure or 0.0, 0.0), 1.0), height=12, class_="benign")
    return [
        _tag("td", str(module.get("name")), class_="name"),
        _tag("td", " × ".join(map(str, shape)), data_value=float(math.prod(shape)) if shape else None),
        _number(module.get("rank")),
        _number(structure, _svg([shared, _line(90 * MIN_EXPLAINED_VARIANCE, "threshold")], 90, 12)),
        _number(gain, _svg([bar, _line(45, "axis")], 90, 12)),
        _tag("td", "yes" if refined else "no"),
        _number((module.get("truncation_error") or {}).get("max")),
        _tag("td", _spectrum(module)),
    ]


def _spectrum(module: dict[str, Any]) -> _Markup:
    values, rank = module.get("spectrum") or [], module.get("rank") or 0
    if not values:
        return _Markup("")
    bars = [f"M{4 * k} 24v{-24 * value / (max(values) or 1):.1f}h3V24z" for k, value in enumerate(values)]
    title = _tag("title", f"rank {rank}; {', '.join(map(_show, values[: rank + 4]))}")
    inside = _tag("path", d=" ".join(bars[:rank]), class_="benign")
    rest = _tag("path", d=" ".join(bars[rank:]), class_="neutral")
    return _svg([title, inside, rest], 4 * len(values), 24)


def _line(x: float, kind: str) -> _Markup:
    return _tag("path", d=f"M{x:g} 0V12", class_=kind)


def _table(heads: Sequence[str], rows: Iterable[Iterable[_Markup]], falling: str | None = None) -> _Markup:
    """Return a sortable table; its rows are already sorted by the column ``falling``."""
    top = [_tag("th", head, scope="col", aria_sort="descending" if head == falling else None) for head in heads]
    body = [_tag("tr", *row) for row in rows]
    return _tag("table", _tag("thead", _tag("tr", *top)), _tag("tbody", *body), class_="sortable")


def _number(value: float | None, picture: _Markup | None = None) -> _Markup:
    return _tag("td", _show(value), picture or _Markup(""), data_value="" if value is None else repr(value))


def _figure(picture: _Markup, caption: str) -> _Markup:
    return _tag("figure", picture, _tag("figcaption", caption))


def _svg(drawing: Iterable[_Markup], width: float, height: float, label: str | None = None) -> _Markup:
    return _tag("svg", *drawing, width=width, height=height, role="img" if label else None, aria_label=label)


def _pairs(values: dict[str, Any], before: str = "") -> Iterator[_Markup]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _pairs(value, f"{before}{key}: ")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield from (_tag("dt", f"{before}{key}"), _tag("dd", text))


def _tag(name: str, *children: str, **attributes: str | float | None) -> _Markup:
    """Return an element without attributes of None; attributes, and children that are not markup yet, are escaped."""
    inner = "".join(child if isinstance(child, _Markup) else escape(child) for child in children)
    said = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    head = "".join(f' {key}="{escape(value if isinstance(value, str) else f"{value:.6g}")}"' for key, value in said)
    return _Markup(f"<{name}{head}>{inner}</{name}>")


def _thinned(values: Sequence[Any], size: float) -> Iterator[tuple[int, Any]]:
    """Yield every n-th value with its position, so that the labels do not overlap."""
    step = math.ceil(12 / size)
    return ((place, value) for place, value in enumerate(values) if place % step == 0)


def _shorten(name: str) -> str:
    return name if len(name) <= SHORT else "…" + name[1 - SHORT :]


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _symlog(score: float) -> float:
    size = abs(score)
    return score if size <= LINEAR else math.copysign(LINEAR * (1 + math.log(size / LINEAR)), score)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
