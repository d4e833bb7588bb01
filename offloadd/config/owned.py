"""Engine options that offloadd sets or must vouch for, so that `args` and `env` may not."""

from __future__ import annotations

from collections.abc import Mapping

_ADDRESS = "offloadd chooses where an engine listens"
_KEY = "offloadd guards engines itself; clients' keys go into server.auth"
_SAFETY = "it opens files or other machines to whoever can send requests"
_MODEL = "use source"

_FLAGS: Mapping[str, str] = {
    **dict.fromkeys(("--host", "--hostname", "--port", "--uds", "--api-prefix", "--root-path"), _ADDRESS),
    **dict.fromkeys(("--api-key", "--api-key-file"), _KEY),
    **dict.fromkeys(("--model", "-m", "--model-id", "--model-url", "-mu", "--hf-repo", "-hf", "-hfr", "--hf-file", "-hff"), _MODEL),
    **dict.fromkeys(("--alias", "-a", "--served-model-name"), "use aliases"),
    **dict.fromkeys(("--ctx-size", "-c", "--max-model-len", "--max-total-tokens"), "use context, in tokens per sequence"),
    **dict.fromkeys(("--parallel", "-np", "--max-num-seqs", "--max-batch-size"), "use parallel"),
    **dict.fromkeys(("--n-gpu-layers", "--gpu-layers", "-ngl"), "use gpu_layers"),
    **dict.fromkeys(
        ("--device", "-dev", "--device-ids", "--tensor-parallel-size", "-tp", "--num-shard", "--sharded"), "use devices"
    ),
    **dict.fromkeys(("--pipeline-parallel-size", "-pp", "--data-parallel-size", "-dp"), "memory is placed for tensor parallelism"),
    **dict.fromkeys(("--gpu-memory-utilization", "--device-memory-utilization", "--cuda-memory-fraction"), "use vram"),
    **dict.fromkeys(("--prometheus-port", "--shard-uds-path", "--master-addr", "--master-port"), _ADDRESS),
    "--kv-cache-memory-bytes": "use vllm.kv_cache",
    "--sleep-idle-seconds": "to ask whether it works wakes it, and what it gave back may be somebody else's: use idle_timeout",
    **dict.fromkeys(("--log-file", "--log-disable"), "an engine's output is kept and shown by offloadd"),
    **dict.fromkeys(("--fit", "-fit"), "memory is reserved before the start: use gpu_layers and vram"),
    **dict.fromkeys(
        (
            *("--rpc", "--slot-save-path", "--path", "--media-path", "--tool-server", "--tools"),
            *("--allowed-local-media-path", "--models-dir", "--models-preset"),
        ),
        _SAFETY,
    ),
    "--trust-remote-code": "it runs code that comes with the model: use trust_remote_code of vllm or tgi",
}
_VARIABLES: Mapping[str, str] = {
    **dict.fromkeys(
        ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"),
        "use devices: memory is reserved on the GPUs that an engine is given",
    ),
    **dict.fromkeys(("AIP_MODE", "AIP_HTTP_PORT", "LLAMA_SERVER_ROUTER_PORT"), _ADDRESS),
    **dict.fromkeys(("LLAMA_API_KEY", "LLAMA_ARG_API_KEY_FILE", "VLLM_API_KEY"), _KEY),
    **dict.fromkeys(("LLAMA_ARG_HOST", "LLAMA_ARG_PORT", "LLAMA_ARG_API_PREFIX", "HOSTNAME", "PORT"), _ADDRESS),
    **dict.fromkeys(("LLAMA_ARG_RPC", "LLAMA_ARG_STATIC_PATH", "LLAMA_ARG_MEDIA_PATH", "TRUST_REMOTE_CODE"), _SAFETY),
    **dict.fromkeys(("VLLM_PORT", "VLLM_HOST_IP", "MASTER_PORT", "PROMETHEUS_PORT", "SHARD_UDS_PATH"), _ADDRESS),
    **dict.fromkeys(("VLLM_SERVER_DEV_MODE",), "it opens endpoints to whoever reaches the port"),
    **dict.fromkeys(("CUDA_MEMORY_FRACTION", "VLLM_CPU_KVCACHE_SPACE"), "use vram, and vllm.kv_cache"),
    "API_KEY": _KEY,
    "MODEL_ID": _MODEL,
    "NUM_SHARD": "use devices",
    "LLAMA_LOG_FILE": "an engine's output is kept and shown by offloadd",
}
_OWN_PREFIX = "OFFLOADD_"


def owned_flag(argument: str) -> tuple[str, str] | None:
    """(flag, what to do instead) when an argument sets what offloadd owns, also as `--flag=value` or `--the_flag`."""
    flag = argument.partition("=")[0]
    # llama-server and vLLM take underscores for dashes.
    spelled = flag.replace("_", "-") if flag.startswith("--") else flag
    return (flag, _FLAGS[spelled]) if spelled in _FLAGS else None


def owned_variable(name: str) -> str | None:
    """What to do instead, when an environment variable is offloadd's to set."""
    if name.startswith(_OWN_PREFIX):
        return f"names that start with {_OWN_PREFIX} are offloadd's own"
    return _VARIABLES.get(name)
