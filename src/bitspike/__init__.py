"""bitspike: low-bit spiking vision networks, from training to a device.

The names below are imported when first used: `import bitspike` imports neither torch nor numpy, and the device side
(`load`, `profile` of a file) works in the base install. Submodules hold the rest.
"""
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "spec": ("QuantSpec", "Scheme", "SpecError"),
    "neurons": ("LIF", "IELIF"),
    "quantizers": ("LSQ", "PowerOfTwo", "Binary", "Membrane"),
    "layers": ("quantize_", "codes"),
    "data": ("DataError",),
    "recipe": ("Recipe",),
    "training": ("train", "evaluate", "load_run", "RunError"),
    "searching": ("search", "SearchError"),
    "exporting": ("export_model", "ExportError"),
    "profiling": ("profile", "Report"),
    "deploy": ("load", "ArtifactError"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [*_MODULE_OF]

if TYPE_CHECKING:
    from bitspike.data import DataError as DataError
    from bitspike.deploy import ArtifactError as ArtifactError
    from bitspike.deploy import load as load
    from bitspike.exporting import ExportError as ExportError
    from bitspike.exporting import export_model as export_model
    from bitspike.layers import codes as codes
    from bitspike.layers import quantize_ as quantize_
    from bitspike.neurons import IELIF as IELIF
    from bitspike.neurons import LIF as LIF
    from bitspike.profiling import Report as Report
    from bitspike.profiling import profile as profile
    from bitspike.quantizers import LSQ as LSQ
    from bitspike.quantizers import Binary as Binary
    from bitspike.quantizers import Membrane as Membrane
    from bitspike.quantizers import PowerOfTwo as PowerOfTwo
    from bitspike.recipe import Recipe as Recipe
    from bitspike.searching import SearchError as SearchError
    from bitspike.searching import search as search
    from bitspike.spec import QuantSpec as QuantSpec
    from bitspike.spec import Scheme as Scheme
    from bitspike.spec import SpecError as SpecError
    from bitspike.training import RunError as RunError
    from bitspike.training import evaluate as evaluate
    from bitspike.training import load_run as load_run
    from bitspike.training import train as train


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'bitspike' has no attribute {name!r}; it has {', '.join(sorted(_MODULE_OF))}.")
    try:
        found = getattr(importlib.import_module(f"bitspike.{_MODULE_OF[name]}"), name)
    except ModuleNotFoundError as error:
        from bitspike.extras import explain

        raise explain(error) or error from None
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
