"""Every parser of the table, a modest number of times; `make fuzz ARGS='--runs 100000'` does the same for long."""

from __future__ import annotations

import pytest

from tests.fuzz.table import Parser, parsers, tried

TABLE = list(parsers())


@pytest.mark.parametrize("parser", TABLE, ids=[parser.name for parser in TABLE])
def test_whatever_comes(parser: Parser) -> None:
    tried(parser, parser.runs)
