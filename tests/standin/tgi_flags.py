"""The command line of text-generation-launcher 3.3: every option. Each may come from a variable with its plain name, too."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

_VALUED = """
    --model-id --revision --validation-workers --num-shard --quantize --speculate --dtype --kv-cache-dtype
    --max-concurrent-requests --max-best-of --max-stop-sequences --max-top-n-tokens --max-input-tokens --max-input-length
    --max-total-tokens --waiting-served-ratio --max-batch-prefill-tokens --max-batch-total-tokens --max-waiting-tokens
    --max-batch-size --cuda-graphs --hostname --port --prometheus-port --shard-uds-path --master-addr --master-port
    --huggingface-hub-cache --weights-cache-override --cuda-memory-fraction --rope-scaling --rope-factor --otlp-endpoint
    --otlp-service-name --cors-allow-origin --api-key --watermark-gamma --watermark-delta --ngrok-authtoken --ngrok-edge
    --tokenizer-config-path --max-client-batch-size --lora-adapters --usage-stats --payload-limit
    --graceful-termination-timeout --sharded
"""
_SWITCHES = """
    --trust-remote-code --json-output --disable-custom-kernels --disable-grammar-support --enable-prefill-logprobs --ngrok
    --env
"""
VALUED = frozenset(_VALUED.split())
SWITCHES = frozenset(_SWITCHES.split())
_SHORT = {"-p": "--port", "-g": "--graceful-termination-timeout", "-e": "--env"}
_NUMBERS = (
    "--num-shard",
    "--max-concurrent-requests",
    "--max-input-tokens",
    "--max-total-tokens",
    "--max-batch-prefill-tokens",
    "--max-batch-total-tokens",
    "--max-batch-size",
    "--port",
    "--prometheus-port",
    "--master-port",
    "--max-client-batch-size",
    "--graceful-termination-timeout",
)


class BadArgument(Exception):
    """A command line that is refused; the text is what is printed."""


@dataclass(frozen=True, slots=True)
class Options:
    """A command line, read: the value of each flag, from the command line else from the environment."""

    values: dict[str, str] = field(default_factory=dict)
    switches: frozenset[str] = frozenset()

    def number(self, flag: str, default: int) -> int:
        return int(self.values.get(flag, default))

    @property
    def model_id(self) -> str:
        return self.values.get("--model-id", "bigscience/bloom-560m")

    @property
    def hostname(self) -> str:
        """A name that is no address falls back to all interfaces."""
        given = self.values.get("--hostname", "0.0.0.0")
        return given if given.replace(".", "").isdigit() else "0.0.0.0"

    @property
    def port(self) -> int:
        return self.number("--port", 3000)

    @property
    def prometheus_port(self) -> int:
        return self.number("--prometheus-port", 9000)

    @property
    def master_addr(self) -> str:
        return self.values.get("--master-addr", "localhost")

    @property
    def master_port(self) -> int:
        return self.number("--master-port", 29500)

    @property
    def num_shard(self) -> int:
        """As many as there are visible cards, when it is not said."""
        visible = [card for card in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if card]
        return self.number("--num-shard", max(1, len(visible)))

    @property
    def max_concurrent_requests(self) -> int:
        return self.number("--max-concurrent-requests", 128)

    @property
    def max_total_tokens(self) -> int:
        return self.number("--max-total-tokens", 4096)

    @property
    def max_input_tokens(self) -> int:
        return self.number("--max-input-tokens", self.max_total_tokens - 1)

    @property
    def max_batch_prefill_tokens(self) -> int:
        return self.number("--max-batch-prefill-tokens", self.max_input_tokens + 50)

    @property
    def max_batch_total_tokens(self) -> int:
        return self.number("--max-batch-total-tokens", 16000)

    @property
    def max_batch_size(self) -> int | None:
        return self.number("--max-batch-size", 0) or None

    @property
    def max_client_batch_size(self) -> int:
        return self.number("--max-client-batch-size", 4)

    @property
    def cuda_memory_fraction(self) -> float:
        return float(self.values.get("--cuda-memory-fraction", 1.0))

    @property
    def graceful_s(self) -> float:
        return float(self.values.get("--graceful-termination-timeout", 90))

    @property
    def api_key(self) -> str | None:
        return self.values.get("--api-key")

    def shard_socket(self, rank: int) -> str:
        return f"{self.values.get('--shard-uds-path', '/tmp/text-generation-server')}-{rank}"


def parse(argv: list[str], environment: Mapping[str, str]) -> Options:
    """Read it as clap does: `--flag value` or `--flag=value`; raise BadArgument with its words."""
    values = {flag: value for flag in VALUED if (value := environment.get(_variable(flag)))}
    switches: set[str] = set()
    rest = iter(argv)
    for given in rest:
        name, has_value, inline = given.partition("=")
        flag = _SHORT.get(name, name)
        if flag in SWITCHES:
            switches.add(flag)
        elif flag in VALUED:
            values[flag] = _checked(flag, inline if has_value else next(rest, None))
        else:
            raise BadArgument(f"error: unexpected argument '{given}' found")
    options = Options(values, frozenset(switches))
    if options.max_input_tokens >= options.max_total_tokens:
        raise SystemExit(_invalid("`max_input_tokens must be < `max_total_tokens`"))
    return options


def _variable(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_").upper()


def _checked(flag: str, value: str | None) -> str:
    shown = f"{flag} <{_variable(flag)}>"
    if value is None:
        raise BadArgument(f"error: a value is required for '{shown}' but none was supplied")
    if flag in _NUMBERS and not value.isdigit():
        raise BadArgument(f"error: invalid value '{value}' for '{shown}': invalid digit found in string")
    return value


def _invalid(why: str) -> int:
    os.write(2, f'Error: ArgumentValidation("{why}")\n'.encode())
    return 1
