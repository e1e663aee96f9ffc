"""The bundled model's tokenizer: whole words, single digits, and bytes for the rest, so that it loses nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from tasks.data.bundled_problems import bundled_problems, bundled_stories

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, END, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"
# Not special: a decoded response must still show where its reasoning ends.
THINK, END_THINK = "<think>", "</think>"

# Operators take their spaces with them and words their leading space, so that every digit is one and the same token
# wherever it stands; anything else is one character.
_PIECES = r"\\boxed\{| [-+*/=] |: | ?[A-Za-z]+|\d|[\s\S]"
_NUM_SAMPLES = 3000

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '<|user|>' + message['content'] + '<|end|>' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ '<|assistant|>' + message['content'] + '<|end|>' }}"
    "{%- else -%}{{ raise_exception('this chat template knows the roles user and assistant only') }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer as Hugging Face loads it from its own saved files. Deterministic; takes about a second."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=_backend(),
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def _backend() -> Tokenizer:
    specials = [PAD, END, USER, ASSISTANT]
    splitter = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    entries = [*specials, THINK, END_THINK, *(f"<0x{byte:02X}>" for byte in range(256)), *_words(splitter)]
    # Without merges, `ignore_merges` takes a piece whole if the vocabulary has it, and `byte_fallback` spells the rest.
    vocabulary = {entry: index for index, entry in enumerate(entries)}
    model = models.BPE(vocabulary, [], byte_fallback=True, ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in (THINK, END_THINK)])
    return tokenizer


def _words(splitter: pre_tokenizers.PreTokenizer) -> list[str]:
    """Every piece of a large sample of the bundled texts, sorted; a word it missed would be spelled in bytes."""
    rows = bundled_problems("train", _NUM_SAMPLES, seed=0) + bundled_stories("train", _NUM_SAMPLES, seed=0)
    pieces: set[str] = set()
    for row in rows:
        text = row["prompt"] + "\n" + row["response"].replace(THINK, "").replace(END_THINK, "")
        pieces.update(piece for piece, _ in splitter.pre_tokenize_str(text))
    return sorted(pieces)
