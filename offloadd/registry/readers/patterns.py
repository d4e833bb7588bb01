"""What llama.cpp knows of an architecture by its name alone, as of build b10434.

A name that is missing here gets the ordinary rule: attention over the whole context in every block.
"""

from __future__ import annotations

from typing import NamedTuple


class Sliding(NamedTuple):
    """Which blocks look back only a window. Of `period` blocks one is full: the last, or with `full_first` the first."""

    period: int
    full_first: bool = False
    unsaid: int = 0
    """The window of a file that does not say one."""
    fixed: int = 0
    """The window of a file that says any."""
    blocks: int = 0
    """Only models with this many blocks slide."""


SLIDING: dict[str, Sliding] = {
    "gemma2": Sliding(2, unsaid=4096),
    "gemma3": Sliding(6),
    "gemma3n": Sliding(5),
    "gpt-oss": Sliding(2),
    "llama4": Sliding(4, unsaid=8192, fixed=8192),
    "cohere2": Sliding(4),
    "exaone4": Sliding(4, unsaid=4096, blocks=64),
    "exaone-moe": Sliding(4, unsaid=128),
    "olmo2": Sliding(4),
    "plamo3": Sliding(8),
    "afmoe": Sliding(4),
    "mellum": Sliding(4),
    "cohere2moe": Sliding(4, full_first=True),
    "laguna": Sliding(4, full_first=True),
    "smallthinker": Sliding(4, full_first=True, fixed=4096),
}
BY_ARRAY = frozenset({"gemma4", "step35", "mimo2", "granite-swa", "maple"})
"""Slide where the file's own list says so, and nowhere else."""
ATTENTION_SLIDES = frozenset({"lfm2"})
"""All attention blocks slide, when there is a window."""

RECURRENT = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})
"""No attention in any block."""
RECURRENT_WITHOUT_KV_HEADS = frozenset({"jamba", "plamo2", "granitehybrid", "lfm2", "lfm2moe", "kimi-linear"})
"""A block without KV heads keeps a state."""
RECURRENT_OR_FEED_FORWARD = frozenset({"nemotron_h", "nemotron_h_moe"})
"""A block with a feed-forward network is nothing else and keeps nothing."""
RECURRENT_BY_INTERVAL = frozenset({"qwen3next", "qwen35", "qwen35moe"})
"""Every fourth block, or as the file says, has attention."""
BOTH = frozenset({"falcon-h1"})
"""Attention and state in every block."""

NO_CACHE = frozenset(
    {
        "bert",
        "modern-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "neo-bert",
        "jina-bert-v2",
        "jina-bert-v3",
        "eurobert",
        "gemma-embedding",
        "t5encoder",
        "wavtokenizer-dec",
        "dream",
        "llada",
        "llada-moe",
        "rnd1",
    }
)
"""Encoders and diffusion models: each request is computed whole."""

LATENT = frozenset({"deepseek2", "deepseek2-ocr", "deepseek32", "glm-dsa", "mistral4", "kimi-linear"})
"""Keep one row for keys and values of all heads, when the file has the sizes for it."""
INDEXED = frozenset({"deepseek32", "glm-dsa"})
"""Keep a small row more for each token, by which attention picks what it looks at."""

CACHE_IN_FIRST_BLOCKS = {"gemma3n": 20}
"""Later blocks read the cache of earlier ones."""
MAMBA_1 = frozenset({"mamba", "jamba"})
"""The first generation of state-space blocks, which needs other working memory than the second."""
