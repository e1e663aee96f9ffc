"""The tokenizer of a model folder."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tasks.runtime.stage import StageError


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer; one without padding token pads with its EOS, which every attention mask here hides."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise StageError(f"cannot read the tokenizer in {path}: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
