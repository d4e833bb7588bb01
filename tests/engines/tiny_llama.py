"""Makes a tiny random Llama with a byte-level tokenizer and a chat template. Run it in the environment of vLLM."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_VOCABULARY = 512
_TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}<|assistant|>"
_MARKS = ("<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")


def make(folder: Path) -> None:
    """Write config, weights and tokenizer. Head size must be 32 at least: with less, the engine dies at its first request."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=256,
        eos_token_id=257,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: number for number, letter in enumerate(letters)}
    words.update({mark: len(words) + number for number, mark in enumerate(_MARKS)})
    words.update({f"<|unused{number}|>": number for number in range(len(words), _VOCABULARY)})
    inner = Tokenizer(models.BPE(vocab=words, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(_MARKS[2:])})
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


if __name__ == "__main__":
    make(Path(sys.argv[1]))
