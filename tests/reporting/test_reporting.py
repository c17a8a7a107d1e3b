"""Figures and the page: they hold what the report says, and nothing from elsewhere."""
import re
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib")

from bitspike.reporting import bits_figure, front_figure, page, save_figures, write_page
from bitspike.reporting.figures import GROUPS, as_svg, undominated


def point(name, group, bits, top1, layers=None):
    return {"name": name, "group": group, "bits": bits, "bytes": int(bits * 1000), "weight_bytes": int(bits * 900),
            "energy_pj": bits * 1e6, "top1": top1, "divergence": 0.1, "layers": layers or {}}


LAYERS = {"stem": {"kind": "uniform", "bits": 8, "key": "uniform:8"}, "<b>&head": {"kind": "pow2", "bits": 2, "key": "pow2:2"}}
REPORT = {"method": "sensitivity", "budget": "bits=3", "seed": 0, "seconds": 12.3,
          "searched": point("searched", "searched", 3.0, 90.0, LAYERS),
          "points": [point("full precision", "float", 32.0, 91.0), point("uniform, 3 bits", "uniform", 3.0, 80.0),
                     point("front 2.00 bits", "front", 2.0, 85.0)],
          "damage": {"stem": {"uniform:8": 0.0, "pow2:2": 0.5}, "<b>&head": {"pow2:2": 0.01}},
          "layers": {n: {"weights": 100, "energy_pj": 5.0} for n in LAYERS},
          "technology": "45nm", "constants": ["int8 add: 0.03 pJ (Horowitz)"]}


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.text = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


def parsed(html):
    tags = Tags()
    tags.feed(html)
    return tags, " ".join(tags.text)


def test_page_is_whole_and_self_contained():
    html = page(REPORT, ["bitspike train X --spec <spec>"])
    tags, text = parsed(html)
    names = {name for name, _ in tags.seen}
    assert "script" not in names and "link" not in names and "img" not in names
    assert not any(str(v).startswith("http") for _, attrs in tags.seen for k, v in attrs.items() if k in ("src", "href"))
    assert sum(name == "svg" for name, _ in tags.seen) == 2
    for expected in ("3.00 bits", "10.7x", "uniform, 3 bits", "-11.00", "bitspike train X --spec <spec>", "int8 add",
                     "<b>&head"):
        assert expected in text, expected
    assert html.count("outline:2px solid") == 2  # what was chosen, in the table of damages


def test_after_training_the_page_shows_the_test_set():
    trained = [point("float", "float", 32.0, 92.0), point("searched 3", "searched", 3.0, 91.6)]
    _, text = parsed(page(REPORT, (), trained))
    assert "91.60 %" in text and "on the test set" in text and "-0.40" in text and "Before fine-tuning" in text


def test_the_front_is_what_nothing_beats():
    points = [point(n, "uniform", bits, top1) for n, bits, top1 in (("a", 2, 50), ("b", 3, 49), ("c", 4, 60), ("d", 2, 40))]
    assert [p["name"] for p in undominated(points, "bytes")] == ["a", "c"]


def test_figures_show_every_group_and_are_repeatable(tmp_path):
    points = [point(g, g, b, 80 + b) for b, g in enumerate(GROUPS, start=2)]
    svg = as_svg(front_figure(points))
    assert all(label in svg for label, _, _ in GROUPS.values())
    assert svg == as_svg(front_figure(points))
    written = save_figures({"front": front_figure(points), "bits": bits_figure(LAYERS, REPORT["layers"])}, tmp_path / "new")
    assert [p.name for p in written] == ["front.svg", "front.png", "bits.svg", "bits.png"]
    assert all(p.stat().st_size > 2000 for p in written)
    assert written[1].read_bytes()[:4] == b"\x89PNG" and re.search("stem", written[2].read_text())


def test_the_page_appears_whole_or_not_at_all(tmp_path):
    write_page(tmp_path / "r.html", REPORT)
    before = (tmp_path / "r.html").read_text()
    with pytest.raises(KeyError):
        write_page(tmp_path / "r.html", {**REPORT, "searched": {}})
    assert (tmp_path / "r.html").read_text() == before and [p.name for p in tmp_path.iterdir()] == ["r.html"]
