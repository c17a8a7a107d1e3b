"""The command line. This module starts fast: torch is imported by the commands that need it, when they run."""
from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError

import bitspike
from bitspike.cli import bench, desk, device, search
from bitspike.cli.messages import complain, warn
from bitspike.extras import explain

ERROR, INTERRUPTED = 2, 1

app = App(name="bitspike", version=bitspike.__version__, help="Low-bit spiking vision networks, from training to a device.",
          help_format="plaintext", result_action="return_value", suppress_keyboard_interrupt=False)
app.command(device.run)
app.command(desk.train)
app.command(desk.evaluate, name="eval")
app.command(search.search)
app.command(desk.export)
app.command(desk.profile)
app.command(bench.bench)
app.command(desk.layers)
app.command(desk.recipes)
app.command(desk.demo)


def _message(error: BaseException) -> str | None:
    """The text for an error a user can mend; None for a defect of ours, which deserves its traceback."""
    if isinstance(error, ImportError) and (missing := explain(error)):
        return str(missing)
    ours = type(error).__module__.partition(".")[0] == "bitspike"
    if ours or isinstance(error, OSError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    # a plain ValueError counts as a message only where this package raised it on purpose
    if isinstance(error, ValueError) and frames and str(Path(bitspike.__file__).parent) in frames[-1].filename \
            and (frames[-1].line or "").startswith("raise"):
        return str(error)
    return None


def call(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for an error (one message on stderr), 1 when interrupted.

    BITSPIKE_DEBUG=1 shows tracebacks. A training that was interrupted, but saved, keeps its own code, 128 + signal.
    """
    show = warnings.showwarning

    def one_line(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, UserWarning):
            warn(str(message))
        else:
            show(message, category, *place, **more)

    warnings.showwarning = one_line
    try:
        result = app(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        complain(str(error))
        return ERROR
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # `bitspike ... | head`
        sys.stderr.close()
        return ERROR
    except Exception as error:
        text = _message(error)
        if text is None or os.environ.get("BITSPIKE_DEBUG", "0") not in ("", "0"):
            raise
        complain(text)
        return ERROR
    finally:
        warnings.showwarning = show
    return result if isinstance(result, int) else 0


def main() -> None:
    """Entry point of the script `bitspike`."""
    sys.exit(call())
