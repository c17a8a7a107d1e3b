"""What tests of several folders share."""
from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def two_processes(tmp_path: Path) -> Callable[..., None]:
    """A function that runs `go(*arguments)` of a test file, given by its name and path, in two processes side by side."""

    def run(name: str, file: str, *arguments: object) -> None:
        source = str(Path(importlib.util.find_spec("bitspike").origin).parents[1])
        script = tmp_path / "go.py"
        script.write_text("import importlib.util, sys; name, path, *arguments = sys.argv[1:]\n"
                          "s = importlib.util.spec_from_file_location(name, path); m = importlib.util.module_from_spec(s)\n"
                          "sys.modules[name] = m; s.loader.exec_module(m); m.go(*arguments)\n")
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), name, file,
             *map(str, arguments)], capture_output=True, text=True, timeout=120,
            env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
        assert done.returncode == 0, done.stderr[-3000:]

    return run
