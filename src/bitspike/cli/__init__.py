"""The command line. This module starts fast: torch is imported by the commands that need it, when they run."""
from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError, Parameter

import bitspike
from bitspike.cli import bench, desk, device, search
from bitspike.cli.messages import complain, warn
from bitspike.extras import explain

ERROR, INTERRUPTED = 2, 1

HELP = ("Low-bit spiking vision networks, from training to a device.\n\n"
        "A RECIPE is a network with all that its training needs, a RUN the folder that training writes, a .bitspike FILE all "
        "that a device needs. The files cifar10, cifar10-binary and cifar10-binary-spikes are inside the package.")

# no --no-json, --empty-set and their like: nothing here is on, or filled, by default
app = App(name="bitspike", version=bitspike.__version__, help=HELP, default_parameter=Parameter(negative=()),
          help_format="plaintext", result_action="return_value", suppress_keyboard_interrupt=False)
# in the order of use, and shown so
_COMMANDS: dict[str, Callable[..., int]] = {
    "demo": desk.demo, "recipes": desk.recipes, "layers": desk.layers, "train": desk.train, "eval": desk.evaluate,
    "search": search.search, "export": desk.export, "run": device.run, "profile": desk.profile, "bench": bench.bench}
for _place, (_name, _command) in enumerate(_COMMANDS.items()):
    app.command(_command, name=_name, sort_key=_place)


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
