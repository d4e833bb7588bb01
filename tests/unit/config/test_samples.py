"""Sample configs: good ones load, and each bad one earns exactly the diagnostics written beside it.

`OFFLOADD_WRITE_EXPECTED=1 pytest tests/unit/config/test_samples.py` writes them anew; read the difference before keeping it.
"""

import json
import os
from pathlib import Path

import jsonschema
import pytest

from offloadd.backends import discover
from offloadd.config import Loaded, Mark, SourceText, json_schema, load, render_text
from offloadd.config.diagnostics import error

ROOT = Path(__file__).parents[3]
SAMPLES = ROOT / "tests" / "samples"
BAD = sorted(path for path in (SAMPLES / "bad").iterdir() if path.suffix != ".expected")
GOOD = sorted((SAMPLES / "good").iterdir())
EXAMPLES = sorted(path for path in (ROOT / "config").iterdir() if path.suffix in (".yaml", ".json"))
BACKENDS = discover()


class Vault:
    """The references that the samples make."""

    def env(self, name):
        return {"CLOUD_KEY": "s3cr3t-cloud"}.get(name)

    def file(self, path):
        if path.startswith("/run/secrets/"):
            return "s3cr3t-file\n"
        raise FileNotFoundError(2, "No such file or directory", path)


def load_file(path: Path) -> Loaded:
    return load([SourceText(path.name, path.read_text())], backends=BACKENDS, secrets=Vault())


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.name)
def test_a_bad_sample_earns_its_diagnostics(path):
    loaded = load_file(path)
    rendered = loaded.render()
    expected = path.with_name(path.name + ".expected")
    if os.environ.get("OFFLOADD_WRITE_EXPECTED"):
        expected.write_text(rendered)
    assert rendered == expected.read_text()
    assert loaded.desired is None
    assert loaded.errors


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.name)
def test_no_secret_is_ever_printed(path):
    loaded = load_file(path)
    said = loaded.render() + json.dumps(loaded.shown)
    assert "s3cr3t" not in said
    assert "hunter2" not in said
    assert "12345678" not in said


@pytest.mark.parametrize("name", ["ten-mistakes.yaml", "ten-mistakes.json"])
def test_ten_mistakes_are_reported_at_once(name):
    loaded = load_file(SAMPLES / "bad" / name)
    assert len(loaded.errors) == len(loaded.diagnostics) == 10
    assert len({entry.mark for entry in loaded.errors}) == 10


def test_both_spellings_of_ten_mistakes_earn_the_same_words():
    said = [
        [entry.message.split(";")[0] for entry in load_file(SAMPLES / "bad" / f"ten-mistakes.{kind}").errors]
        for kind in ("yaml", "json")
    ]
    assert said[0] == said[1]


@pytest.mark.parametrize("path", [*GOOD, *EXAMPLES], ids=lambda path: path.name)
def test_a_good_sample_loads(path):
    loaded = load_file(path)
    assert loaded.errors == ()
    assert loaded.desired is not None


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_has_nothing_to_remark(path):
    assert load_file(path).render() == ""


@pytest.mark.parametrize("path", [*GOOD, *EXAMPLES], ids=lambda path: path.name)
def test_a_good_sample_fits_the_published_schema(path):
    validator = jsonschema.Draft202012Validator(json_schema(BACKENDS))
    assert [error.message for error in validator.iter_errors(load_file(path).shown)] == []


# What a JSON Schema cannot say: references between parts, options by name, how duplicates and syntax are written.
BEYOND_A_SCHEMA = {
    *("alias-clash.yaml", "backends.yaml", "merge-key.yaml", "model-twice.yaml", "owned.yaml", "references.yaml", "tag.yaml"),
    *("engines.yaml", "exposed.json", "exposed.yaml", "listen.yaml", "not-a-number.yaml", "pins.yaml"),
}


REFUSED_BY_SCHEMA = [path for path in BAD if path.name not in BEYOND_A_SCHEMA and load_file(path).shown]


@pytest.mark.parametrize("path", REFUSED_BY_SCHEMA, ids=lambda path: path.name)
def test_a_bad_sample_does_not_fit_the_published_schema(path):
    assert not jsonschema.Draft202012Validator(json_schema(BACKENDS)).is_valid(load_file(path).shown)


@pytest.mark.parametrize("line", ["key: a", '"key": "a"', "hf_token=a", '["--api-key", "a"]', "PASSWORD:  a", "key: 5", "key: 'a'"])
def test_a_line_that_may_hold_a_secret_is_not_shown(line):
    assert render_text([error(Mark("x", 1, 1), "wrong")], [SourceText("x", line)]) == "x:1:1: error: wrong\n"


@pytest.mark.parametrize("line", ["key:", 'key: "${env:A}"', "key: ${file:/a}", "keys: [a]", "monkey", 'key: ""'])
def test_other_lines_are_shown(line):
    assert line in render_text([error(Mark("x", 1, 1), "wrong")], [SourceText("x", line)])
