"""Estimates against a real llama-server: a few models; `python -m bench.estimates` has them all."""

from __future__ import annotations

from pathlib import Path

import pytest

from offloadd.demo import find_model, find_server
from offloadd.errors import OffloaddError

pytest.importorskip("gguf", reason="the gguf package, which makes the tiny models, is not installed")

from bench.estimates import DOCUMENT, FEW, MARKER, QUICK_MODELS, TARGETS, compare
from bench.tiny_models import OTHER, make


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    try:
        find_server()
    except OffloaddError as error:
        pytest.skip(error.message)


@pytest.mark.parametrize("name", QUICK_MODELS)
def test_tiny_models_take_what_was_estimated(tmp_path: Path, name: str) -> None:
    path = make(name, tmp_path, OTHER)
    missed = [compare(name, path, options).missed for options in FEW]
    path.unlink()  # up to 200 MB, which pytest would keep

    assert missed == [()] * len(FEW)


def test_the_real_model_takes_what_was_estimated() -> None:
    try:
        path = find_model()
    except OffloaddError as error:
        pytest.skip(error.message)
    for options in FEW:
        row = compare("SmolLM2", path, options)
        assert row.missed == ()
        assert abs(row.error("total")) < 1


def test_the_table_in_the_document_meets_its_targets() -> None:
    generated = DOCUMENT.read_text().partition(MARKER)[2]
    cells = [
        [cell.strip() for cell in line.split("|")] for line in generated.splitlines() if " / " in line and line.startswith("| ")
    ]
    places = {"weights": 7, "cache": 8, "total": 10}
    worst = {part: max(abs(float(row[place])) for row in cells) for part, place in places.items()}

    assert len({row[1] for row in cells}) > 20
    assert all(worst[part] <= target for part, target in TARGETS.items()), worst
