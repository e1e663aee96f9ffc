"""The tokenizer of a model folder."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tasks.checkpoints.files import FETCH, refused
from tasks.data.wording import first_line


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer; one without padding token pads with its EOS, which every attention mask here hides."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a library makes of a user's file is that file's fault
        raise refused(path, f"transformers cannot read its tokenizer ({first_line(error)})", FETCH) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
