"""What the adapter tells TGI, takes of the ledger, and reads out of its words."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from offloadd.backends.tgi import BACKEND, TgiOptions
from offloadd.state.desired import Engine, ModelSpec
from offloadd.state.ids import LOCAL, BackendName, DeviceId, ModelName
from offloadd.state.launch import Endpoint, ExitKind, ExitStatus, Health, ModelFacts, Placement, ProbeReply
from offloadd.units import Bytes, Seconds

GIB = 2**30
ENGINE = Engine(name=BackendName("tgi"), adapter="tgi", command=("text-generation-launcher",))
GPU, OTHER = DeviceId(LOCAL, "GPU-1"), DeviceId(LOCAL, "GPU-2")
CARD = Bytes(24 * GIB)
FACTS = ModelFacts(path="org/model", size=Bytes(GIB))
AT = Endpoint(host="127.0.0.1", port=41000, more=(41001, 41002), key="secret")


def spec(**fields: object) -> ModelSpec:
    base = {"name": ModelName("m"), "source": "org/model", "backends": (ENGINE.name,)}
    return ModelSpec(**base | fields)  # type: ignore[arg-type]


def argv(placement: Placement, **fields: object) -> list[str]:
    return list(BACKEND.launch(ENGINE, spec(**fields), FACTS, placement, AT).argv)


def after(flag: str, words: list[str]) -> str:
    return words[words.index(flag) + 1]


def on(size: int, used: int, *gpus: DeviceId) -> Placement:
    cards = gpus or (GPU,)
    same = {"whole": CARD, "used": Bytes(used)}
    parts = {name: dict.fromkeys(cards, value) for name, value in same.items()}
    return Placement(reserved=dict.fromkeys(cards, Bytes(size)), gpus=cards, elastic=True, **parts)


@pytest.mark.parametrize(("promised", "used"), [(8 * GIB, 0), (8 * GIB, 10 * GIB), (4 * GIB, 2 * GIB), (20 * GIB, 0)])
def test_its_fraction_counts_what_others_hold_already(promised: int, used: int) -> None:
    fraction = float(after("--cuda-memory-fraction", argv(on(promised, used))))
    own = 0.90 * fraction * CARD - used  # TGI's own rule, for the whole card
    assert own + GIB // 2 <= promised  # graphs come after that
    assert own + GIB // 2 > promised - CARD / 4000


def test_a_fraction_is_never_more_than_the_card() -> None:
    assert after("--cuda-memory-fraction", argv(on(23 * GIB, GIB))) == "1.0000"


def test_nothing_is_left_to_a_variable_with_a_plain_name() -> None:
    words = argv(on(8 * GIB, 0))
    assert (after("--hostname", words), after("--port", words)) == ("127.0.0.1", "41000")
    assert (after("--prometheus-port", words), after("--master-port", words)) == ("41001", "41002")
    assert re.fullmatch(r"/tmp/offloadd-tgi-[0-9a-f]{16}", after("--shard-uds-path", words))
    other = BACKEND.launch(ENGINE, spec(), FACTS, on(8 * GIB, 0), replace(AT, key="another")).argv
    assert after("--shard-uds-path", words) != after("--shard-uds-path", list(other)), "whoever can guess it can be there first"
    assert after("--model-id", words) == "org/model"
    assert after("--usage-stats", words) == "off"
    assert after("--num-shard", words) == "1"
    assert "secret" not in words


def test_its_sockets_lie_in_the_launchs_own_folder_unless_it_runs_in_a_container() -> None:
    at = replace(AT, folder="/var/lib/ml-offload/tmp/0123456789ab")

    def place(*command: str) -> str:
        engine = replace(ENGINE, command=command)
        return after("--shard-uds-path", list(BACKEND.launch(engine, spec(), FACTS, on(8 * GIB, 0), at).argv))

    assert place("text-generation-launcher") == f"{at.folder}/shard"
    assert place("numactl", "-N0", "text-generation-launcher") == f"{at.folder}/shard"
    for command in (("podman", "run", "tgi"), ("/usr/bin/docker", "run", "tgi"), ("sudo", "podman", "run", "tgi")):
        assert place(*command).startswith("/tmp/offloadd-tgi-"), "which is the container's own"


def test_requests_with_pictures_are_not_too_large_for_it() -> None:
    assert int(after("--payload-limit", argv(on(8 * GIB, 0)))) == 2**30
    for words in (("--payload-limit", "5"), ("--payload-limit=5",)):
        said = argv(on(8 * GIB, 0), args=words)
        assert [word.partition("=")[0] for word in said].count("--payload-limit") == 1, "said twice, it refuses to start"


def test_shards_are_as_many_as_cards() -> None:
    assert after("--num-shard", argv(on(8 * GIB, 0, GPU, OTHER))) == "2"


def test_sequences_and_their_number_are_bounded_as_the_config_says() -> None:
    words = argv(on(8 * GIB, 0), context=2048, parallel=3)
    assert (after("--max-total-tokens", words), after("--max-input-tokens", words)) == ("2048", "2047")
    assert int(after("--max-batch-prefill-tokens", words)) >= 2047
    assert after("--max-batch-size", words) == "3"


def test_router_and_shards_share_the_time_that_an_end_may_take() -> None:
    words = argv(on(8 * GIB, 0), stop_timeout=Seconds(30))
    assert 2 * int(after("--graceful-termination-timeout", words)) < 30


def test_typed_options_become_flags() -> None:
    options = TgiOptions(quantize="awq", cuda_graphs=False, lora=("a", "b"))
    words = argv(on(8 * GIB, 0), options={"tgi": options}, args=("--json-output",))
    assert (after("--quantize", words), after("--cuda-graphs", words), after("--lora-adapters", words)) == ("awq", "0", "a,b")
    assert words[-1] == "--json-output"


def test_its_promise_is_a_tenth_more_than_it_fills() -> None:
    shape = None
    assert BACKEND.estimate(spec(), FACTS) is None
    assert shape is None
    estimate = BACKEND.estimate(spec(vram=Bytes(6 * GIB)), FACTS)
    assert estimate is not None
    assert (estimate.total, estimate.elastic) == (6 * GIB, True)


@pytest.mark.parametrize(
    ("path", "reply", "health"),
    [
        ("/health", ProbeReply(status=None), Health.SILENT),
        ("/health", ProbeReply(status=200), Health.READY),
        ("/health", ProbeReply(status=503), Health.SILENT),
        ("/info", ProbeReply(status=200, body=b'{"router":"text-generation-router"}'), Health.READY),
        ("/info", ProbeReply(status=200, body=b'{"other":1}'), Health.SILENT),
        ("/generate", ProbeReply(status=200), Health.READY),
        ("/generate", ProbeReply(status=429), Health.READY),
        ("/generate", ProbeReply(status=424), Health.SILENT),
    ],
)
def test_probes(path: str, reply: ProbeReply, health: Health) -> None:
    assert BACKEND.read_probe(spec(), path, reply) is health


@pytest.mark.parametrize(
    ("lines", "kind", "said"),
    [
        (["error: unexpected argument '--frob' found"], ExitKind.BAD_OPTION, "--frob"),
        (["error: invalid value 'x' for '--num-shard <NUM_SHARD>': invalid digit"], ExitKind.BAD_OPTION, "refuses x"),
        (['Error: ArgumentValidation("`max_input_tokens must be < `max_total_tokens`")'], ExitKind.BAD_OPTION, "max_input"),
        (["Failed to bind to addr 127.0.0.1:1", "Error: WebserverFailed"], ExitKind.PORT_TAKEN, "port"),
        (["thread 'main' panicked: failed to build prometheus recorder", "Error: WebserverFailed"], ExitKind.PORT_TAKEN, "port"),
        (["Not enough memory to handle 4096 prefill tokens. You need to decrease"], ExitKind.OUT_OF_MEMORY, "4096 prefill tokens"),
        (["Shard 0 failed to start", "Error: ShardCannotStart"], ExitKind.BAD_MODEL, "could not load"),
        (['Error: NotEnoughCUDADevices("`sharded` is true but only 1")'], ExitKind.BAD_OPTION, "too few GPUs"),
        (["Error: DownloadError"], ExitKind.BAD_MODEL, "download"),
    ],
)
def test_failed_starts_are_explained(lines: list[str], kind: ExitKind, said: str) -> None:
    cause = BACKEND.explain_exit(ExitStatus(code=1), lines, was_ready=False)
    assert cause.kind is kind
    assert said in cause.message


def test_a_part_that_died_while_serving_is_named() -> None:
    assert "a shard died" in BACKEND.explain_exit(ExitStatus(code=1), ["Shard 0 crashed"], was_ready=True).message
    assert "its router died" in BACKEND.explain_exit(ExitStatus(code=1), ["Webserver Crashed"], was_ready=True).message


def test_the_launch_carries_its_key_in_the_environment_only() -> None:
    launch = BACKEND.launch(ENGINE, spec(), FACTS, on(8 * GIB, 0), AT)
    assert launch.env["API_KEY"] == "secret"
    assert BACKEND.launch(ENGINE, spec(), FACTS, on(8 * GIB, 0), replace(AT, key="")).env.get("API_KEY") is None
