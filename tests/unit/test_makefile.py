"""The Makefile: what it leaves to be set from outside, and nothing else."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEFT_OPEN = {"ARGS", "DESTDIR", "OFFLOADD_ENGINES", "XDG_CACHE_HOME", "HOME", "MAKE_RESTARTS", "GNUMAKEFLAGS"}


@pytest.mark.parametrize("target", ["engines", "test", "faults", "soak", "bench", "lint", "clean", "install-units"])
def test_no_recipe_uses_a_variable_that_nobody_sets(target: str) -> None:
    asked = ["make", "--dry-run", "--warn-undefined-variables", "--old-file=.venv/.ready", target]
    shown = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    unset = {line.rpartition("'")[0].rpartition("'")[2] for line in shown.stderr.splitlines() if "undefined variable" in line}
    assert unset <= LEFT_OPEN


def test_engines_go_where_they_are_told_to(tmp_path: Path) -> None:
    asked = ["make", "--dry-run", "engines", f"OFFLOADD_ENGINES={tmp_path}"]
    shown = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    assert f'"{tmp_path}/vllm"' in shown.stdout
