"""A Qwen2 tokenizer that needs no download: one token per byte, plus whole words on request.

The pipeline drops the first 108 tokens of every prompt, the length of its system message under the real
tokenizer. Here the system message is cut into as many pieces as it takes to come out at 108 too, so that the
pipeline's own encoding code runs unchanged on small models.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from diffusers import HunyuanVideo15ImageToVideoPipeline
from tokenizers import AddedToken, pre_tokenizers
from transformers import Qwen2Tokenizer

PREFIX_TOKENS = 108
_CHAT_TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SYSTEM_MESSAGE: str = (
    inspect.signature(HunyuanVideo15ImageToVideoPipeline._get_mllm_prompt_embeds).parameters["system_message"].default
)


def small_qwen_tokenizer(words: Sequence[str] = ()) -> Qwen2Tokenizer:
    """Builds the tokenizer; every entry of `words` becomes a single token.

    Raises:
        RuntimeError: if no cut of the system message gives a prefix of 108 tokens.
    """
    for pieces in range(PREFIX_TOKENS, 40, -1):
        tokenizer = _tokenizer_with_pieces(pieces, words)
        if _prefix_length(tokenizer) == PREFIX_TOKENS:
            return tokenizer
    raise RuntimeError(f"the system message of this diffusers version does not fit {PREFIX_TOKENS} tokens")


def _prefix_length(tokenizer: Qwen2Tokenizer) -> int:
    messages = [[{"role": "system", "content": _SYSTEM_MESSAGE}, {"role": "user", "content": ""}]]
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=False, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return encoded.input_ids.shape[1] - 2  # without the <|im_end|> and the newline after the empty prompt


def _tokenizer_with_pieces(pieces: int, words: Sequence[str]) -> Qwen2Tokenizer:
    vocabulary = {"<|endoftext|>": 0}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], padding_side="right")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    body = "system\n" + _SYSTEM_MESSAGE
    short, longer = divmod(len(body), pieces)
    bounds = [i * short + min(i, longer) for i in range(pieces + 1)]
    prefix = dict.fromkeys(body[a:b] for a, b in zip(bounds, bounds[1:], strict=False))
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in prefix])
    tokenizer.add_tokens([AddedToken(p, normalized=False) for p in ("user\n", "assistant\n")])
    tokenizer.add_tokens([AddedToken(word, normalized=False, single_word=True) for word in words])
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer
