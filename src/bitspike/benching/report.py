"""What a bench found, as tables."""
from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from bitspike.benching.comparison import Result
from bitspike.benching.engines import OURS


def _number(value: object, digits: int = 1) -> str:
    return f"{value:,.{digits}f}" if isinstance(value, (int, float)) else "-"


def tables(result: Result) -> Iterator[Table | str]:
    """A table of the engines, then remarks, one line each."""
    table = Table(title=f"{result.name}: batch {result.batch}, {result.threads} thread{'s' * (result.threads > 1)}, "
                        f"kernels {result.kernels}", title_justify="left")
    table.add_column("engine", no_wrap=True)
    headings = ["ms, median", "p10 .. p90", "least", "x ours", "images/s", "first ms", "peak MiB", "file bytes"]
    headings += ["logits differ", "top-1 same"] if result.agreement else []
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, timing in sorted(result.timings.items(), key=lambda item: item[1].median):
        fresh = result.fresh.get(name, {})
        row = [name, _number(timing.median, 2), f"{timing.p10:.2f} .. {timing.p90:.2f}", _number(timing.least, 2),
               _number(timing.median / result.ours_ms, 2), _number(1e3 * result.batch / timing.median),
               _number(fresh.get("cold_start_ms"), 0), _number(fresh.get("peak_mb"), 0),
               f"{result.peer_file_bytes.get(name, 0):,}"]
        if result.agreement:
            found = result.agreement.get(name)
            row += [f"{found['largest_logit_difference']:.3g}", f"{found['top1_agreement']:.0%}"] if found else ["", ""]
        table.add_row(*row, style="bold" if name == OURS.name else None)
    yield table
    yield "ms: one call; first ms: imports, loading and the first answer in a fresh process; peak MiB: of that process"
    yield (f"density: {result.density:.1%} of the spikes and counts are not 0 ({result.density_by_macs:.1%} weighted by "
           f"multiplications), on {result.pictures}; file {result.file_bytes:,} bytes; {result.machine}")
    best = result.best_peer
    if best is not None:
        yield f"best peer: {best}, {result.peers[best] / result.ours_ms:.2f} x the time of bitspike"
    uneasy = [name for name, timing in result.timings.items() if timing.p90 > 1.5 * timing.p10]
    if uneasy:
        yield f"the machine was busy: times of {', '.join(uneasy)} spread by more than half; look at 'least', or measure again"
    for name, share in result.int8.items():
        yield f"{name}: {share} convolutions run on int8, by its own account"
    if result.same_function:
        found = result.same_function
        yield (f"same function: given the integers' own inputs, no op of the float network is further off than "
               f"{found['largest_potential_difference']:.2g} (1: one spike more), and {found['codes_different']} of "
               f"{found['codes']:,} codes differ (ties at a threshold). Over many layers such ties add up: see 'logits differ'")
    for name, why in result.left_out.items():
        yield f"not measured: {name}: {why}"
