"""docs/security.md promises nothing that no test holds."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()
ROWS = [line for line in PAGE.split("## Promises", 1)[1].split("## ", 1)[0].splitlines() if line.startswith("| ")][2:]
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


@pytest.mark.parametrize("row", ROWS, ids=[row.split("|")[1].strip() for row in ROWS])
def test_each_promise_has_tests_that_are_there(row: str) -> None:
    named = TEST.findall(row)
    assert named
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text())
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}, name


def test_the_daemon_holds_no_template_engine() -> None:
    """A template in a model's metadata is text, because there is nothing here that could render it."""
    code = "import sys, offloadd.daemon; sys.exit(bool({'jinja2', 'mako'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
