"""docs/security.md promises nothing that no test holds."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.table import parsers

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()
ROWS = [line for line in PAGE.split("## Promises", 1)[1].split("## ", 1)[0].splitlines() if line.startswith("| ")][2:]
TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


@pytest.mark.parametrize("row", ROWS, ids=[row.split("|")[1].strip() for row in ROWS])
def test_each_promise_has_tests_that_are_there(row: str) -> None:
    assert [name for _, name in TEST.findall(row) if name]


def test_every_test_that_the_page_names_is_one_that_is_run() -> None:
    """Wherever on the page: a function of a module that is collected, under a name that is collected."""
    named = TEST.findall(PAGE)
    assert len(named) > 60
    for path, name in named:
        file = ROOT / path
        tests = {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
        assert not name or (name in tests and name.startswith("test_") and file.name.startswith("test_")), (path, name)


def test_the_page_tells_how_much_is_fuzzed() -> None:
    rows = list(parsers())
    assert f"{sum(row.runs for row in rows):,} inputs to {len(rows)} parsers" in PAGE


def test_the_daemon_holds_no_template_engine() -> None:
    """A template in a model's metadata is text, because there is nothing here that could render it."""
    code = "import sys, offloadd.daemon; sys.exit(bool({'jinja2', 'mako'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
