"""`--save`: the events of every window and the decision over time, as an animated GIF or a page that needs nothing else."""
from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bitspike.deploy import Decision
from bitspike.deploy.fields import printable
from bitspike.writing import whole_file

_MOST = 256       # pixels of the picture's longer side
_TOP = 5          # classes beside it
_BACK, _TEXT, _DIM = (14, 17, 22), (230, 235, 240), (110, 120, 132)
_ON, _OFF, _BAR = (255, 196, 92), (86, 156, 255), (92, 214, 170)


class Elapsed:
    """Seconds since a recording began; where its clock jumped, they go on from before the jump."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.stop = 0
        self.seconds = 0.0

    def after(self, decision: Decision) -> float:
        """At the end of this window; to be asked for every one in turn."""
        if self.first is None:
            self.first = decision.start
        elif decision.jumped:
            self.first += decision.start - self.stop
        self.stop = decision.stop
        self.seconds = max(self.seconds, (decision.stop - self.first) / 1e6)  # by count, times may be out of order
        return self.seconds


def _pictures(counts: np.ndarray) -> np.ndarray:
    """RGB uint8 [windows, h, w, 3]: ON bright amber, OFF blue, brighter where there are more events."""
    # by the brightest per cent of the pixels that fired
    fired = counts[counts > 0]
    full = max(1.0, float(np.percentile(fired, 95))) if len(fired) else 1.0
    strength = np.minimum(counts / full, 1.0) ** 0.6
    picture = np.full((len(counts), *counts.shape[2:], 3), _BACK, np.float32)
    for index, colour in ((0, _OFF), (1, _ON)):
        share = strength[:, index, :, :, None].astype(np.float32)
        picture = picture * (1 - share) + np.array(colour, np.float32) * share
    return picture.round().astype(np.uint8)


def _shares(decisions: Sequence[Decision]) -> np.ndarray:
    logits = np.stack([d.logits for d in decisions]).astype(np.float64)
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)  # type: ignore[no-any-return]


def write_film(path: Path, classes: Sequence[str], decisions: Sequence[Decision]) -> None:
    """Write `path`, .gif or .html; it appears when it is complete. Errors: OSError; ValueError without a window.

    The events are those that each decision was made of, as the network was given them.
    """
    if not decisions:
        raise ValueError(f"{path}: the recording ended before its first window; there is nothing to show.")
    counts = np.stack([d.frame.transpose(2, 0, 1) for d in decisions])
    pictures, shares = _pictures(counts), _shares(decisions)
    clock = Elapsed()
    seconds = [clock.after(decision) for decision in decisions]
    names = [printable(name) for name in classes]
    content = (_gif if path.suffix.lower() == ".gif" else _page)(pictures, shares, names, decisions, seconds)
    with whole_file(path) as file:
        file.write(content)


def _durations(decisions: Sequence[Decision]) -> list[int]:
    """Milliseconds a window is shown, 20..1000: as long as it lasted."""
    return [min(1000, max(20, round((d.stop - d.start) / 1000))) for d in decisions]


def _gif(pictures: np.ndarray, shares: np.ndarray, names: Sequence[str], decisions: Sequence[Decision],
         seconds: Sequence[float]) -> bytes:
    scale = max(1, _MOST // max(pictures.shape[1:3]))
    height, width = pictures.shape[1] * scale, pictures.shape[2] * scale
    panel, chart = 240, 72
    rows = min(_TOP, len(names))
    total_height = max(height, 40 + 34 * rows) + chart
    small, large = ImageFont.load_default(12), ImageFont.load_default(15)
    watched = np.argsort(-shares.max(0), kind="stable")[:rows]
    frames = []
    for index, (pixels, decision) in enumerate(zip(pictures, decisions, strict=True)):
        canvas = Image.new("RGB", (width + panel, total_height), _BACK)
        canvas.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST), (0, 0))
        draw = ImageDraw.Draw(canvas)
        draw.text((width + 12, 8), f"{seconds[index]:.2f} s   window {decision.step}", _DIM, small)
        order = np.argsort(-shares[index], kind="stable")[:rows]
        for row, c in enumerate(order):
            y = 32 + 34 * row
            colour = _TEXT if row == 0 else _DIM
            draw.text((width + 12, y), names[c][:22], colour, large)
            draw.text((width + panel - 52, y), f"{shares[index, c]:.0%}", colour, large)
            draw.rectangle((width + 12, y + 20, width + panel - 12, y + 25), (36, 42, 50))
            draw.rectangle((width + 12, y + 20, width + 12 + round((panel - 24) * float(shares[index, c])), y + 25), _BAR)
        box = (8, total_height - chart + 8, width + panel - 8, total_height - 8)
        _draw_chart(draw, shares, watched, int(order[0]), index, box)
        frames.append(canvas.quantize(64, dither=Image.Dither.NONE))
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=_durations(decisions), loop=0, optimize=False)
    return out.getvalue()


def _draw_chart(draw: ImageDraw.ImageDraw, shares: np.ndarray, watched: np.ndarray, best: int, index: int,
                box: tuple[int, int, int, int]) -> None:
    """Probabilities over all windows, the best class of this moment bright, up to now."""
    left, top, right, bottom = box
    draw.rectangle(box, outline=(36, 42, 50))
    steps = max(1, len(shares) - 1)
    for c in [*[w for w in watched if w != best], best]:
        line = [(left + (right - left) * i / steps, bottom - 2 - (bottom - top - 4) * float(shares[i, c]))
                for i in range(index + 1)]
        if len(line) > 1:
            draw.line(line, _BAR if c == best else (70, 78, 88), 2 if c == best else 1)


_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>bitspike stream</title>
<style>body{margin:0;background:#0e1116;color:#e6ebf0;font:15px system-ui,sans-serif}main{max-width:900px;margin:24px auto;
padding:0 16px}#top{display:flex;gap:24px;flex-wrap:wrap}canvas{display:block;border-radius:6px;background:#0b0d11}
#view{image-rendering:pixelated;width:min(100%,420px);height:auto}#side{flex:1;min-width:240px}.row{margin:10px 0}
.name{display:flex;justify-content:space-between}.bar{height:6px;background:#242a32;border-radius:3px;margin-top:4px}
.bar i{display:block;height:6px;background:#5cd6aa;border-radius:3px}#chart{width:100%;height:120px;margin-top:20px}
.dim{color:#8b97a5}input{width:100%;accent-color:#5cd6aa}button{background:#242a32;color:inherit;border:0;padding:8px 16px;
border-radius:6px;font:inherit;cursor:pointer}b.on{color:#ffc45c}b.off{color:#569cff}</style></head><body><main>
<h2>Events and the decision over time</h2><p class="dim"><b class="on">ON</b> brighter, <b class="off">OFF</b> darker;
WINDOWS windows.</p><div id="top"><canvas id="view" width="W_" height="H_"></canvas><div id="side"><div id="when" class="dim">
</div><div id="rows"></div></div></div><canvas id="chart" width="1800" height="240"></canvas>
<input id="at" type="range" min="0" max="LAST" value="0" aria-label="window"><p><button id="go">Pause</button></p></main>
<script>const D=DATA;const I=new Image();const v=document.getElementById('view').getContext('2d'),
c=document.getElementById('chart').getContext('2d'),at=document.getElementById('at'),go=document.getElementById('go');
let i=0,on=true,timer;const text=(t)=>document.createTextNode(t);
function rank(k){return D.shares[k].map((s,j)=>[s,j]).sort((a,b)=>b[0]-a[0]).slice(0,D.top)}
function draw(){v.drawImage(I,(i%D.columns)*D.w,Math.floor(i/D.columns)*D.h,D.w,D.h,0,0,D.w,D.h);
document.getElementById('when').textContent=(D.stop[i]/1e6).toFixed(3)+' s, window '+D.step[i]+', '+D.events[i]+' events, '+
D.latency[i].toFixed(2)+' ms';const rows=document.getElementById('rows');rows.replaceChildren();
for(const [s,j] of rank(i)){const r=document.createElement('div');r.className='row';const n=document.createElement('div');
n.className='name';n.append(text(D.names[j]),text((100*s).toFixed(1)+' %'));const b=document.createElement('div');
b.className='bar';const f=document.createElement('i');f.style.width=100*s+'%';b.append(f);r.append(n,b);rows.append(r)}
c.clearRect(0,0,1800,240);const best=rank(i)[0][1],n=Math.max(1,D.shares.length-1);
const seen=[...new Set(D.shares.flatMap((_,k)=>[rank(k)[0][1]]))];
for(const j of [...seen.filter(j=>j!=best),best]){c.beginPath();c.strokeStyle=j==best?'#5cd6aa':'#46505c';
c.lineWidth=j==best?4:2;D.shares.forEach((s,k)=>c[k?'lineTo':'moveTo'](k/n*1796+2,236-232*s[j]));c.stroke()}
c.fillStyle='#e6ebf0';c.fillRect(i/n*1796+1,0,2,240);at.value=i}
function next(){timer=setTimeout(()=>{if(on){i=(i+1)%D.shares.length;draw()}next()},D.ms[i])}
at.oninput=()=>{i=+at.value;draw()};go.onclick=()=>{on=!on;go.textContent=on?'Pause':'Play'};
I.onload=()=>{draw();next()};I.src=D.sheet;</script></body></html>
"""


def _page(pictures: np.ndarray, shares: np.ndarray, names: Sequence[str], decisions: Sequence[Decision],
          seconds: Sequence[float]) -> bytes:
    number, height, width = pictures.shape[:3]
    columns = max(1, min(number, 8192 // width))
    lines = -(-number // columns)
    sheet = np.zeros((lines * columns, height, width, 3), np.uint8)
    sheet[:number] = pictures
    sheet = sheet.reshape(lines, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    sheet = sheet.reshape(lines * height, columns * width, 3)
    png = io.BytesIO()
    Image.fromarray(sheet).quantize(128, dither=Image.Dither.NONE).save(png, "PNG", optimize=True)
    sheet_url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    data = {"w": width, "h": height, "columns": columns, "top": min(_TOP, len(names)), "names": list(names),
            "shares": shares.round(4).tolist(), "stop": [round(1e6 * s) for s in seconds],
            "step": [d.step for d in decisions], "events": [d.events for d in decisions],
            "latency": [round(d.latency_ms, 3) for d in decisions], "ms": _durations(decisions), "sheet": sheet_url}
    text = json.dumps(data).replace("<", "\\u003c")  # no class name can end the script
    page = _PAGE.replace("WINDOWS", str(number)).replace("W_", str(width)).replace("H_", str(height))
    return page.replace("LAST", html.escape(str(number - 1))).replace("DATA", text).encode()
