"""One self-contained HTML page about a search: no script, nothing loaded from elsewhere."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from bitspike.reporting.figures import GROUPS, as_svg, bits_figure, front_figure
from bitspike.writing import write_text

_STYLE = """
:root { color-scheme: light; --ink:#1d2433; --quiet:#667085; --line:#e6e9ef; --blue:#1769c2; --card:#fff; --back:#f5f7fa }
* { box-sizing: border-box } body { margin:0; background:var(--back); color:var(--ink); font:16px/1.55 system-ui,-apple-system,
"Segoe UI",Roboto,sans-serif } main { max-width:1120px; margin:0 auto; padding:48px 24px 80px }
h1 { font-size:30px; line-height:1.2; margin:0 0 8px; letter-spacing:-.02em } h2 { font-size:19px; margin:0 0 4px }
p { margin:0 0 12px; max-width:75ch } .quiet { color:var(--quiet); font-size:14px }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(200px,1fr)); gap:16px; margin:28px 0 }
.tile, section { background:var(--card); border:1px solid var(--line); border-radius:14px }
.tile { padding:18px 20px } .tile b { display:block; font-size:27px; letter-spacing:-.02em; line-height:1.25 }
.tile span { color:var(--quiet); font-size:13.5px } .tile em { color:var(--blue); font-style:normal; font-weight:600 }
section { padding:24px; margin:0 0 20px; overflow-x:auto } section svg { width:100%; height:auto; margin-top:8px }
table { border-collapse:collapse; width:100%; font-size:14px; font-variant-numeric:tabular-nums; margin-top:10px }
th { text-align:right; color:var(--quiet); font-weight:500; padding:6px 10px; border-bottom:1px solid var(--line);
white-space:nowrap } td { text-align:right; padding:6px 10px; border-bottom:1px solid var(--line); white-space:nowrap }
th:first-child, td:first-child { text-align:left } tr.best td { font-weight:600; background:#eef5fd }
.dot { display:inline-block; width:9px; height:9px; border-radius:50%; margin-right:8px } .heat td, .heat th { padding:6px 7px }
code, pre { font:13px/1.6 ui-monospace,Menlo,Consolas,monospace } pre { background:#101828; color:#e6edf7; border-radius:10px;
padding:16px 18px; white-space:pre-wrap; overflow-wrap:anywhere; margin:8px 0 0 }
details summary { cursor:pointer; color:var(--quiet) }
ul { margin:8px 0 0; padding-left:20px; font-size:13.5px; color:var(--quiet) }
"""


def _tile(value: str, label: str, note: str = "") -> str:
    return f"<div class=tile><span>{escape(label)}</span><b>{escape(value)}</b><span>{note}</span></div>"


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.1f}x" if b else "n/a"


def _point_rows(points: Sequence[Mapping[str, Any]], full: Mapping[str, Any]) -> str:
    rows = []
    for p in sorted(points, key=lambda p: (p["bits"], p["group"] != "searched")):
        colour = GROUPS.get(p["group"], ("", "#98a2b3", ""))[1]
        mark = "best" if p["group"] == "searched" else ""
        rows.append(f'<tr class="{mark}"><td><i class=dot style="background:{colour}"></i>'
                    f'{escape(p["name"])}</td><td>{p["bits"]:.2f}</td><td>{p["bytes"]:,}</td>'
                    f'<td>{_ratio(full["bytes"], p["bytes"])}</td><td>{p["energy_pj"] / 1e6:,.2f}</td>'
                    f'<td>{_ratio(full["energy_pj"], p["energy_pj"])}</td><td>{p["top1"]:.2f}</td>'
                    f'<td>{p["top1"] - full["top1"]:+.2f}</td></tr>')
    headings = ("spec", "bits", "file, bytes", "smaller", "energy, uJ", "less", "top-1, %", "to float")
    head = "".join(f"<th>{h}</th>" for h in headings)
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _small(value: float) -> str:
    return "0" if not value else "&lt;0.0001" if value < 1e-4 else f"{value:.4f}" if value < 0.1 else f"{value:.3f}"


def _heat(damage: Mapping[str, Mapping[str, float]], chosen: Mapping[str, str]) -> str:
    columns = list(dict.fromkeys(k for row in damage.values() for k in row))
    top = max((v for row in damage.values() for v in row.values()), default=0.0) or 1.0
    lines = []
    for name, row in damage.items():
        cells = []
        for key in columns:
            value = row.get(key)
            if value is None:
                cells.append("<td></td>")
                continue
            strength = min(1.0, (value / top) ** 0.4)
            frame = ";outline:2px solid #1769c2;outline-offset:-2px" if chosen.get(name) == key else ""
            shade = f"background:rgba(224,123,57,{0.75 * strength:.2f}){frame}"
            cells.append(f'<td style="{shade}">{_small(value)}</td>')
        lines.append(f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>")
    head = "".join(f"<th>{escape(c)}</th>" for c in columns)
    return f"<table class=heat><tr><th>layer</th>{head}</tr>{''.join(lines)}</table>"


def page(report: Mapping[str, Any], commands: Sequence[str] = (), trained: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page as HTML text.

    report: `SearchReport.to_dict()`. commands: what to type next. trained: points after fine-tuning (name, group, bits, bytes,
    energy_pj, top1 on the test set, one of group "float"); they get the first figure then. Errors: KeyError for other data.
    """
    searched = report["searched"]
    shown = [*trained] or [searched, *report["points"]]
    full = next(p for p in shown if p["group"] == "float")
    best = next((p for p in shown if p["group"] == "searched"), searched)
    measured = "after fine-tuning, on the test set" if trained else "before fine-tuning, on the search's own images"
    kinds = dict.fromkeys(s["kind"] for s in searched["layers"].values())
    tiles = [
        _tile(f"{searched['bits']:.2f} bits", "average of a weight", f"{len(searched['layers'])} layers, {', '.join(kinds)}"),
        _tile(f"{searched['bytes'] / 1e3:,.1f} kB", "file",
              f"<em>{_ratio(full['bytes'], searched['bytes'])}</em> smaller than float32"),
        _tile(f"{searched['energy_pj'] / 1e6:,.1f} uJ", "energy per image, bit-aware",
              f"<em>{_ratio(full['energy_pj'], searched['energy_pj'])}</em> less than float32"),
        _tile(f"{best['top1']:.2f} %", "top-1", f"float {full['top1']:.2f} %; {measured}")]
    parts = [
        f"<h1>Bits per layer within {escape(report['budget'])}</h1>",
        f"<p class=quiet>Method: {escape(report['method'])}, seed {report['seed']}, {report['seconds']:,.0f} s. Costs: "
        f"{escape(report['technology'])}.</p><div class=tiles>{''.join(tiles)}</div>",
        f"<section><h2>What accuracy costs</h2><p class=quiet>Top-1 {measured}. Up and to the left is better; the line "
        f"joins what nothing else beats; numbers are average bits.</p>{_svg(front_figure(shown, 'top-1'))}</section>",
        f"<section><h2>Where the bits went</h2><p class=quiet>In the order in which the network defines them.</p>"
        f"{_svg(bits_figure(searched['layers'], report['layers']))}</section>",
        f"<section><h2>Compared</h2><p class=quiet>Top-1 {measured}.</p>{_point_rows(shown, full)}</section>"]
    if trained:
        rest = _point_rows([searched, *report["points"]], next(p for p in report["points"] if p["group"] == "float"))
        parts.append(f"<section><details><summary>Before fine-tuning, on the search's own images</summary>{rest}</details>"
                     "</section>")
    if report["damage"]:
        chosen = {n: s["key"] for n, s in searched["layers"].items()}
        parts.append("<section><h2>What each choice hurts</h2><p class=quiet>Divergence of the predictions (nats) when "
                     f"only that layer is quantized; framed: the choice.</p>{_heat(report['damage'], chosen)}</section>")
    if commands:
        parts.append(f"<section><h2>What next</h2><pre>{escape(chr(10).join(commands))}</pre></section>")
    constants = "".join(f"<li>{escape(line)}</li>" for line in report["constants"])
    parts.append(f"<section><details><summary>Constants of the energies</summary><ul>{constants}</ul></details></section>")
    return (f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport "
            f"content='width=device-width,initial-scale=1'><title>bitspike search: {escape(report['budget'])}</title>"
            f"<style>{_STYLE}</style><main>{''.join(parts)}</main></html>\n")


def _svg(figure: Any) -> str:
    text = as_svg(figure)
    return text[text.index("<svg"):]


def write_page(path: Path, report: Mapping[str, Any], commands: Sequence[str] = (),
               trained: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write the page, whole or not at all."""
    write_text(path, page(report, commands, trained))
