"""What `load` makes of good text, of hostile text, and of several files."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offloadd.backends import discover
from offloadd.backends.llamacpp import LlamaCppOptions
from offloadd.config import Severity, SourceText, load, render_json
from offloadd.state.desired import BackendKind, DesiredState, DeviceBudget, Engine, ModelSpec, ReadyRule, Replicas, RestartPolicy
from offloadd.state.wire import Answer, Framing, Messages, Streamed, Turns, Wire
from offloadd.units import Bytes, Seconds, Share

BACKENDS = discover()
SAMPLES = Path(__file__).parents[2] / "samples"


class Vault:
    def __init__(self, **variables):
        self.variables = variables

    def env(self, name):
        return self.variables.get(name)

    def file(self, path):
        return self.variables[path]


def read(*texts, **variables):
    sources = [SourceText(f"{index}.yaml", text) for index, text in enumerate(texts)]
    return load(sources, backends=BACKENDS, secrets=Vault(**variables))


def model(settings_text="", **variables):
    loaded = read(f"models: {{m: {{source: m.gguf, {settings_text}}}}}", **variables)
    assert loaded.errors == (), loaded.render()
    return loaded.desired.models["m"]


def messages(loaded):
    return [str(entry) for entry in loaded.errors]


def test_defaults_are_those_of_the_desired_state():
    assert model() == ModelSpec(name="m", source="m.gguf", backends=("llamacpp",))
    state = read("models: {m: {source: m.gguf}}").desired
    commands = (("llamacpp", ("llama-server",)), ("vllm", ("vllm", "serve")), ("tgi", ("text-generation-launcher",)))
    engines = {
        name: Engine(name=name, adapter=name, command=command, preference=rank) for rank, (name, command) in enumerate(commands, 1)
    }
    assert state == DesiredState(models=state.models, engines=engines)


def test_every_kind_of_value_becomes_its_type():
    spec = model("vram: 1.5GiB, idle_timeout: 0, stop_timeout: 500ms, devices: [0, GPU-1a], replicas: 2, gpu_layers: 12")
    assert spec.vram == Bytes(1536 * 2**20)
    assert spec.idle_timeout == 0
    assert spec.stop_timeout == Seconds(0.5)
    assert spec.devices == ("0", "GPU-1a")
    assert spec.replicas == Replicas(min=2, max=2)
    assert spec.gpu_layers == 12
    assert model("restart: {backoff: 2s}").restart == RestartPolicy(backoff=Seconds(2))


def test_engine_options_are_the_adapters_own():
    spec = model("llamacpp: {cache_ram: 1GiB, lora: [a, b], flash_attention: on}")
    assert spec.options == {"llamacpp": LlamaCppOptions(cache_ram=Bytes(2**30), lora=("a", "b"), flash_attention="on")}
    assert model().options == {}


def test_budgets_of_single_gpus_inherit_from_the_default():
    budget = read("budget: {gpus: {default: {limit: 80%, reserve: 1GiB}, '0': {limit: 20GiB}, 1: {limit: 0}}}").desired.budget
    assert budget.gpu_default == DeviceBudget(limit=Share(80), reserve=Bytes(2**30))
    assert budget.gpus["0"] == DeviceBudget(limit=Bytes(20 * 2**30), reserve=Bytes(2**30))
    assert budget.gpus["1"].limit == 0


def test_a_hub_id_goes_to_the_engines_that_load_them():
    loaded = read("models: {m: {source: Qwen/Qwen2.5-7B}}")
    assert loaded.desired.models["m"].backends == ("vllm", "tgi")
    assert not loaded.diagnostics


def test_what_an_engine_of_ones_own_says_of_itself_reaches_the_engine():
    custom = "{kind: custom, command: [x], stop_command: [y], health: {path: /up, ready_status: 204}, inference: {path: /api/v2/}}"
    external = "{kind: external, url: 'https://h.example/v1', key: 'sk-1'}"
    engines = read(
        f"backends: {{own: {custom}, cloud: {external}}}\nmodels: {{m: {{source: a, backends: [own, cloud]}}}}"
    ).desired.engines
    own, cloud = engines["own"], engines["cloud"]
    assert (own.stop_command, own.ready, own.api) == (("y",), ReadyRule(path="/up", status=204), "/api/v2")
    assert (own.wire, cloud.wire, cloud.ready) == (None, None, None)
    assert (cloud.adapter, cloud.kind, cloud.url, cloud.key) == ("external", BackendKind.EXTERNAL, "https://h.example/v1", "sk-1")
    assert "sk-1" not in repr(cloud)


def test_json_of_an_engines_own_reaches_the_engine_as_it_is_declared():
    engines = read((SAMPLES / "good" / "formats.yaml").read_text()).desired.engines
    teller, far = engines["storyteller"], engines["far"]
    assert teller.api == "/v1"
    assert teller.wire == Wire(
        path="/api/continue",
        prompt=("in", "0", "text"),
        turns=Turns(system="${text}\n", user="Q: ${text}\n", assistant="A: ${text}\n", open="A:"),
        model=("model",),
        parameters={
            "max_tokens": ("options", "limit"),
            "temperature": ("options", "heat"),
            "stop": ("options", "until"),
            "top_k": ("options", "top/k"),
        },
        body={"in": [{"lang": "en"}], "options": {"safe": False}, "version": 3},
        answer=Answer(
            text=("out", "0", "text"),
            finish_reason=("out", "0", "why"),
            prompt_tokens=("n", "in"),
            completion_tokens=("n", "out"),
            error=("error",),
        ),
        stream=Streamed(
            framing=Framing.NDJSON,
            switch=("flow",),
            text=("text",),
            finish_reason=("why",),
            done=("last",),
            error=("error",),
        ),
        finish_reasons={"limit": "length", "eos": "stop"},
    )
    assert far.ready == ReadyRule(path="/up", status=200)
    assert far.wire == Wire(
        path="/talk",
        messages=Messages(
            at=("dialog",),
            role="speaker",
            content="line",
            roles={"system": "system", "user": "user", "assistant": "machine"},
            system=("rules",),
        ),
        stream=Streamed(framing=Framing.SSE, grows=True, text=()),
    )


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("vllm: {eagre: true}", 'unknown key "eagre" in models.m.vllm (did you mean "eager"?)'),
        ("vllm: {kv_cache: 4}", "kv_cache: expected a size with its unit"),
        ("vllm: {runner: embed}", "runner: expected"),
        ("tgi: {dtype: float8}", "dtype: expected"),
        ("args: [--gpu-memory-utilization, '0.5']", "--gpu-memory-utilization must not be set here"),
        ("args: [--served_model_name=x]", "--served_model_name must not be set here"),
        ("args: [-tp, '2']", "-tp must not be set here"),
        ("env: {VLLM_PORT: '1'}", "VLLM_PORT must not be set here"),
        ("args: [--sleep-idle-seconds=60]", "--sleep-idle-seconds must not be set here"),
        ("env: {AIP_MODE: PREDICTION}", "AIP_MODE must not be set here"),
        ("env: {LLAMA_SERVER_ROUTER_PORT: '1'}", "LLAMA_SERVER_ROUTER_PORT must not be set here"),
        ("env: {CUDA_VISIBLE_DEVICES: '1'}", "CUDA_VISIBLE_DEVICES must not be set here"),
        ("env: {HIP_VISIBLE_DEVICES: '1'}", "HIP_VISIBLE_DEVICES must not be set here"),
    ],
)
def test_options_of_vllm_and_tgi_are_checked_where_they_stand(section, said):
    (error,) = read(f"models: {{m: {{source: org/m, {section}}}}}").errors
    assert said in str(error)
    assert error.mark.line == 1


def test_engines_of_ones_own_are_known_by_name():
    text = "backends: {speech: {kind: custom, command: [run, '${port}']}}\nmodels: {m: {source: x.bin, backends: [speech]}}"
    loaded = read(text)
    assert loaded.desired.models["m"].backends == ("speech",)
    engine = loaded.desired.engines["speech"]
    assert (engine.kind, engine.adapter, engine.command) == (BackendKind.CUSTOM, "custom", ("run", "${port}"))


def test_a_mistake_in_an_engine_does_not_make_its_models_wrong():
    loaded = read("backends: {speech: {kind: custm}}\nmodels: {m: {source: x.bin, backends: [speech]}}")
    assert len(loaded.errors) == 1


def test_a_source_that_nothing_reads_is_an_error():
    assert "no engine can read" not in str(messages(read("models: {m: {source: m.GGUF}}")))
    assert "no engine can read" not in str(messages(read("models: {m: {source: 5}}")))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("${env:A}", "one"), ("x${env:A}-${env:B}", "xone-two"), ("$${env:A}", "${env:A}"), ("${file:/k}", "three")],
)
def test_references_are_filled_in(text, expected):
    spec = model(f'env: {{X: "{text}"}}', A="one", B="two", **{"/k": "three\n"})
    assert spec.env == {"X": expected}


def test_what_is_shown_is_what_was_written_without_secrets():
    text = """
server: {auth: {keys: [{name: a, key: hunter2}, {name: b, key: "${env:K}"}]}}
backends: {cloud: {kind: external, url: "http://x/v1", key: hunter2}}
models: {m: {source: m.gguf, env: {HF_TOKEN: hunter2, X: "${env:K}"}, args: [--hf-token, hunter2, --x-key=hunter2]}}
"""
    loaded = read(text, K="hunter2")
    assert "hunter2" not in json.dumps(loaded.shown)
    assert loaded.shown["server"]["auth"]["keys"][1]["key"] == "${env:K}"
    assert loaded.shown["models"]["m"]["env"]["X"] == "${env:K}"
    assert loaded.desired.models["m"].env["X"] == "hunter2"


def test_a_secret_over_several_lines_is_not_printed():
    text = "server:\n  auth:\n    keys:\n      - name: a\n        key: |\n          hunter2\n          hunter2\n        nme: b\n"
    loaded = read(text)
    assert loaded.errors
    assert "hunter2" not in loaded.render()


def test_files_are_laid_over_one_another():
    loaded = read("models: {a: {source: a.gguf}}", "models: {b: {source: b.gguf}}\nbudget: {host: {limit: 50%}}")
    assert loaded.ok
    assert sorted(loaded.desired.models) == ["a", "b"]


def test_a_key_set_in_two_files_names_both_places():
    loaded = read("models: {a: {source: a.gguf}}", "models:\n  a: {source: b.gguf}")
    assert messages(loaded) == ['1.yaml:2:7: error: "source" is set twice; the first time at 0.yaml:1:14']


def test_a_file_that_cannot_be_parsed_does_not_hide_the_mistakes_of_others():
    loaded = read("a: 'x", "b: @x")
    assert [entry.mark.file for entry in loaded.errors] == ["0.yaml", "1.yaml"]


def test_a_config_without_models_is_pointed_out():
    loaded = read("{}")
    assert loaded.ok
    assert [entry.severity for entry in loaded.diagnostics] == [Severity.WARNING]


BOMBS = {
    "deep list": "[" * 200_000,
    "deep mapping": "{" * 200_000,
    "deep json": '{"a":' * 200_000,
    "deep block": "- " * 200_000,
    "deep keys": "? " * 200_000,
    "aliases": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "alias chain": "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 600)),
    "merges": "a: &a {x: 1}\n" + "".join(f"b{n}: {{<<: [*a, *a]}}\n" for n in range(1000)),
    "itself": "a: &a [*a]",
    "wide": "[" + "1," * 1_500_000 + "1]",
    "wide json": '{"a": [' + "1," * 1_500_000 + "1]}",
    "big": "a: " + "x" * 5_000_000,
    "unknown keys": "\n".join(f"k{n}: 1" for n in range(40_000)),
    "digits": "a: " + "9" * 1_000_000,
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS.keys())
def test_hostile_text_is_rejected_soon(text):
    began = time.process_time()
    loaded = read(text)
    loaded.render()
    assert time.process_time() - began < 8  # under coverage; unbounded, these take from 19 s to for ever
    assert loaded.errors


def test_a_thousand_models_load_soon():
    entry = "source: m.gguf, run: on-demand, idle_timeout: 5m, context: 4096, queue: {max_waiting: 9}, llamacpp: {cache_ram: 0}"
    text = "models:\n" + "".join(f"  m{n}: {{{entry}, aliases: [a{n}]}}\n" for n in range(1000))
    began = time.process_time()
    loaded = read(text)
    assert time.process_time() - began < 8  # 0.15 s on an idle machine, without coverage
    assert len(loaded.desired.models) == 1000


def test_rendered_text_cannot_steer_a_terminal():
    loaded = read('{"mod\\u001b[31mels\\u202e": 1}')
    assert "\x1b" not in loaded.render()
    assert "\u202e" not in loaded.render()
    assert "\\x1b" in loaded.render()
    assert "\x1b" not in json.dumps(render_json(loaded.diagnostics), ensure_ascii=False)


def test_the_caret_stands_below_wide_characters():
    loaded = read("models: {日本: {sorce: a.gguf}}")
    first, second = loaded.render().split("\n")[1:3], loaded.render().split("\n")[4:6]
    assert first[0].index("日") == first[1].index("^")
    assert second[0].index("sorce") + 2 == second[1].index("^")


KEYS = st.sampled_from(
    [
        *("models", "server", "listen", "auth", "keys", "key", "a", "source", "backends", "llamacpp", "vllm", "kind", "budget"),
        *("gpus", "default", "limit", "replicas", "min", "restart", "request", "set", "args", "env", "queue", "aliases", "0"),
    ]
)
TEXT = st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=8)
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | TEXT
WORDS = st.sampled_from(["a.gguf", "llamacpp", "6GiB", "10m", "auto", "custom", "${env:X}", "${", "a/b", "[::1]:1", "--port"])
JUNK = st.recursive(
    SCALARS | WORDS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=5), inner, max_size=5)
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(KEYS, JUNK, max_size=5))
def test_junk_is_answered_with_diagnostics(junk):
    loaded = read(json.dumps(junk))
    assert loaded.ok == (not loaded.errors)
    loaded.render()


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.text(alphabet="{}[]:,-&*!|>'\"#\n\t ab<?%@", max_size=40))
def test_any_text_is_answered_with_diagnostics(text):
    loaded = read(text)
    assert loaded.ok == (not loaded.errors)
    loaded.render()


GOOD_MODEL = st.fixed_dictionaries(
    {"source": st.just("m.gguf")},
    optional={
        "context": st.integers(1, 10**6),
        "pinned": st.booleans(),
        "priority": st.integers(0, 100),
        "vram": st.sampled_from(["auto", "6GiB", "512 MiB"]),
        "idle_timeout": st.sampled_from([0, "10m", "1.5h"]),
        "replicas": st.sampled_from([1, {"min": 0, "max": 2}]),
        "request": st.fixed_dictionaries({"set": st.dictionaries(TEXT, SCALARS, max_size=3)}),
        "args": st.lists(st.sampled_from(["on", "1:30", "0o17", "~", "null", "1_0", "yes", "--verbose", "é"]), max_size=4),
        "llamacpp": st.fixed_dictionaries({}, optional={"cache_ram": st.just("1GiB"), "embeddings": st.booleans()}),
    },
)
GOOD = st.dictionaries(st.from_regex(r"[a-z][a-z0-9._-]{0,8}", fullmatch=True), GOOD_MODEL, min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(GOOD, st.randoms(use_true_random=False))
def test_spelling_and_order_do_not_matter(models, random):
    from_json = read(json.dumps({"models": models}))
    assert from_json.errors == (), from_json.render()
    order = list(models)
    random.shuffle(order)
    shuffled = {name: dict(reversed(models[name].items())) for name in order}
    flow = "models:\n" + "".join(f"  {json.dumps(name)}: {json.dumps(shuffled[name])}\n" for name in order)
    assert read(flow).desired == from_json.desired
