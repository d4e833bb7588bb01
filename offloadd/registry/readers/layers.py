"""What each block of a model keeps and needs, from the keys of its architecture."""

from __future__ import annotations

from offloadd.registry.readers import patterns
from offloadd.registry.readers.facts import Facts
from offloadd.state.shape import LayerCache

_DEFAULT_SHIFTS = 2
_DEFAULT_INTERVAL = 4


class LayerRules:
    """Answers for block `index` of `count`."""

    def __init__(self, facts: Facts, count: int) -> None:
        self._facts, self._count = facts, count
        self._arch = facts.architecture
        self._embedding = facts.number("embedding_length")
        self.heads = facts.per_layer("attention.head_count", count, 0)
        self._feed_forward = facts.per_layer("feed_forward_length", count, 0)
        listed = facts.per_layer("attention.head_count_kv", count, -1)
        self._kv_heads = tuple(own if own >= 0 else heads for own, heads in zip(listed, self.heads, strict=True))
        each = self._embedding // self.heads[0] if self.heads and self.heads[0] else 0
        self._key, self._value = facts.number("attention.key_length", each), facts.number("attention.value_length", each)
        self._latent = self._arch in patterns.LATENT and bool(
            facts.number("attention.key_length_mla") and facts.number("attention.value_length_mla")
        )
        self._queries = max((own * self._key for own in self.heads), default=0)
        self._keys = max((own * self._key for own in self._kv_heads), default=0)
        self._encodes = self._arch in patterns.NO_CACHE
        self.window = self._window()
        self._slides = self._sliding()
        self._last_own = self._blocks_with_own_cache()

    def cache(self, index: int) -> LayerCache:
        """What the block keeps."""
        if self._encodes or index >= self._last_own:
            return LayerCache.NONE
        if self._is_recurrent(index):
            return LayerCache.RECURRENT
        if self._arch in patterns.RECURRENT_OR_FEED_FORWARD and self._feed_forward[index]:
            return LayerCache.NONE
        if self._kv_heads[index] == 0:
            return LayerCache.NONE
        return LayerCache.SLIDING if self._slides[index] else LayerCache.FULL

    def rows(self, index: int) -> tuple[int, int]:
        """Elements of the keys' and of the values' row of a block that has attention."""
        heads = self._kv_heads[index]
        key, value = self._key, self._value
        if self._slides[index]:
            key = self._facts.number("attention.key_length_swa", key)
            value = self._facts.number("attention.value_length_swa", value)
        index_row = self._facts.number("attention.indexer.key_length") if self._arch in patterns.INDEXED else 0
        return heads * key + index_row, 0 if self._latent else heads * value

    def state(self, index: int) -> int:
        """Elements of the state of a block that has one."""
        if self._arch not in patterns.BOTH and not self._is_recurrent(index):
            return 0
        return sum(self._state_parts())

    def _state_parts(self) -> tuple[int, int]:
        """Of the shift or convolution, and of the state proper."""
        number = self._facts.number
        if head := number("wkv.head_size"):
            return number("token_shift_count", _DEFAULT_SHIFTS) * self._embedding, self._embedding * head
        if window := number("shortconv.l_cache"):
            return self._embedding * max(0, window - 1), 0
        kernel = number("ssm.conv_kernel")
        if head := number("kda.head_dim"):
            heads = self.heads[0] if self.heads else 0
            return 3 * (kernel - 1 if kernel else 3) * heads * head, heads * head * head
        inner, size = number("ssm.inner_size"), number("ssm.state_size")
        return max(0, kernel - 1) * (inner + 2 * number("ssm.group_count") * size), size * inner

    def _is_recurrent(self, index: int) -> bool:
        if self._arch in patterns.RECURRENT:
            return True
        if self._arch in patterns.RECURRENT_WITHOUT_KV_HEADS:
            return self._kv_heads[index] == 0
        if self._arch in patterns.RECURRENT_OR_FEED_FORWARD:
            return self._kv_heads[index] == 0 and self._feed_forward[index] == 0
        if self._arch in patterns.RECURRENT_BY_INTERVAL:
            listed = self._facts.listed("attention.recurrent_layers")
            if listed:
                return bool(listed[index]) if index < len(listed) else False
            interval = self._facts.number("full_attention_interval", _DEFAULT_INTERVAL)
            return bool(interval) and (index + 1) % interval != 0
        return False

    def _window(self) -> int:
        """Tokens; 0 when no block slides."""
        told = self._facts.number("attention.sliding_window", -1)
        rule = patterns.SLIDING.get(self._arch)
        if rule is None:
            return max(0, told) if self._arch in patterns.BY_ARRAY | patterns.ATTENTION_SLIDES else 0
        if rule.blocks not in (0, self._count):
            return 0
        if told < 0:
            return rule.unsaid
        return rule.fixed or told if told else 0

    def _sliding(self) -> tuple[bool, ...]:
        if not self.window:
            return (False,) * self._count
        if self._arch in patterns.ATTENTION_SLIDES:
            return (True,) * self._count
        listed = self._facts.listed("attention.sliding_window_pattern")
        if listed or self._arch in patterns.BY_ARRAY:
            return tuple(bool(value) for value in (*listed, *(0,) * self._count)[: self._count])
        rule = patterns.SLIDING[self._arch]
        period = self._facts.number("attention.sliding_window_pattern", rule.period)
        return tuple(_slides(index, period, full_first=rule.full_first) for index in range(self._count))

    def _blocks_with_own_cache(self) -> int:
        """Blocks from here on read others' caches, or only help to guess tokens ahead."""
        count = self._count - self._facts.number("nextn_predict_layers")
        shared = self._facts.number("attention.shared_kv_layers") if self._arch == "gemma4" else 0
        return min(count - shared, patterns.CACHE_IN_FIRST_BLOCKS.get(self._arch, count))

    def attention_row(self) -> int:
        """Elements for one token within attention that makes its scores apart."""
        if self._latent:
            return self._latent_row()
        return 2 * self._queries + 2 * self._keys + 3 * self._embedding if self._queries else 0

    def working_row(self, *, feed_rows: int) -> int:
        """Elements for one token in the widest part of a block; `feed_rows` are those of a dense feed-forward network.

        Which parts are alive at once was found by varying one size at a time and reading what llama-server reserves.
        """
        return max(self._feed_forward_row(feed_rows), self._expert_row(), self._fused_attention_row(), self._recurrent_row())

    def _feed_forward_row(self, feed_rows: int) -> int:
        width = max(self._feed_forward, default=0)
        if not feed_rows:
            return 0
        # Gate and what it lets through are there together with their product.
        inner = 3 * width if feed_rows > width else width
        return inner + (3 if self._encodes else 4) * self._embedding

    def _expert_row(self) -> int:
        used = max(self._facts.per_layer("expert_used_count", 1, 0))
        widths = self._facts.per_layer("expert_feed_forward_length", self._count, 0)
        width = max(widths, default=0) or max(self._feed_forward, default=0)
        ordinary = 0 if self._latent else self._queries
        return 3 * used * width + 3 * self._embedding + max(self._embedding, ordinary) if used else 0

    def _fused_attention_row(self) -> int:
        if self._latent:
            return self._latent_row()
        keys = 0 if self._encodes else 4 * self._keys
        return max(2 * self._queries, keys) + 3 * self._embedding if self._queries else 0

    def _latent_row(self) -> int:
        number = self._facts.number
        rank, rope = number("attention.kv_lora_rank"), number("rope.dimension_count")
        heads = max(self.heads, default=0)
        return 2 * self._embedding + heads * (number("attention.key_length_mla") + 2 * rope + 2 * rank) + 3 * (rank + rope)

    def _recurrent_row(self) -> int:
        number = self._facts.number
        if number("wkv.head_size"):
            return 12 * self._embedding
        inner = number("ssm.inner_size")
        if not inner:
            return 0
        if self._arch in patterns.MAMBA_1:
            return 6 * inner + self._embedding
        mixed = inner + 2 * number("ssm.group_count") * number("ssm.state_size")
        return 2 * inner + 4 * mixed + number("ssm.time_step_rank") + self._embedding


def _slides(index: int, period: int, *, full_first: bool) -> bool:
    if period == 0:
        return True
    return index % period != 0 if full_first else index % period < period - 1
