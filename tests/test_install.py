"""What the base install promises: lazy imports, a message for a missing extra, and doctests that run."""
from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import bitspike
from bitspike.extras import EXTRAS, MissingExtra, explain

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(m.name for m in pkgutil.walk_packages(bitspike.__path__, "bitspike.")
                 if not m.name.rpartition(".")[2].startswith("_"))

# pretends that the packages of the extras are not there
BLOCK = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {set(EXTRAS)!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Block())
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_public_names():
    assert len(bitspike.__all__) <= 25
    for name in bitspike.__all__:
        assert getattr(bitspike, name) is not None
        assert name in dir(bitspike)
    with pytest.raises(AttributeError, match="quantize_"):
        bitspike.quantise


@pytest.mark.parametrize("statement", ["import bitspike", "import bitspike.deploy", "from bitspike import load, profile",
                                       "from bitspike.deploy import load, ArtifactError, kernels", "import bitspike.cost",
                                       "import bitspike.spec", "import bitspike.cli"])
def test_device_side_imports_no_torch(statement):
    done = python(f"{BLOCK}\n{statement}\nassert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_missing_extra_says_what_to_install():
    done = python(f"{BLOCK}\nimport bitspike\nbitspike.quantize_")
    assert done.returncode == 1
    assert "MissingExtra" in done.stderr and "pip install 'bitspike[train]'" in done.stderr
    assert explain(ModuleNotFoundError("No module named 'nosuch'", name="nosuch")) is None
    assert isinstance(explain(ModuleNotFoundError("x", name="torch.nn")), MissingExtra)


def test_extras_match_the_project_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for package, extra in EXTRAS.items():
        needs = [re.split(r"[<>=\[]", need)[0].replace("-", "_") for need in project["optional-dependencies"][extra]]
        assert package in needs
    assert project["version"] == bitspike.__version__
    assert not {"torch", "torchvision"} & {re.split(r"[<>=]", need)[0] for need in project["dependencies"]}


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    if name == "bitspike.__main__":
        return
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        pytest.skip(f"{error.name} is not installed: pip install 'bitspike[{EXTRAS[error.name]}]'")
    assert doctest.testmod(module, optionflags=flags).failed == 0
