"""What a model has to show where it enters: that it can be built, talked to, and that every weight is a number."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase

from tasks.checkpoints.files import refused
from tasks.checkpoints.folders import GENERATION_CONFIG, read_model_folder
from tasks.checkpoints.skeleton import load_config, skeleton
from tasks.checkpoints.tensors import CheckpointTensors
from tasks.checkpoints.tokenizer import load_tokenizer
from tasks.data.templates import check_chat_template
from tasks.data.wording import first_line

PROBE = "What is 1 + 1?"


def admit(path: Path) -> bool:
    """Look at all of a model folder once; returns whether the head is the embeddings.

    Raises StageError with the file, the cause and the remedy.  Every tensor is read, which takes a CPU second per GB
    (measured); looking at it a fourteenth of that.
    """
    folder = read_model_folder(path)
    skeleton(folder, load_config(folder))
    check_tokenizer(path, load_tokenizer(path), folder.config["vocab_size"])
    if (path / GENERATION_CONFIG).is_file():
        try:
            GenerationConfig.from_pretrained(path, local_files_only=True)
        except Exception as error:
            what = f"transformers cannot read it ({first_line(error)})"
            raise refused(path / GENERATION_CONFIG, what, "mend it, or delete the file") from error
    tensors = CheckpointTensors(path)
    tensors.check()
    return tensors.are_tied()


def check_tokenizer(path: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise StageError unless it turns text into tokens of the model and back, and its chat template, if any, works."""
    try:
        highest = max([*tokenizer.get_vocab().values(), *tokenizer.all_special_ids])
        tokens = tokenizer(PROBE)["input_ids"]
        text = tokenizer.decode(tokens)
    except Exception as error:
        raise refused(path, f"its tokenizer cannot be used ({first_line(error)})", "fetch its files anew") from error
    if highest >= vocab_size:
        raise refused(
            path,
            f"the tokenizer has {highest + 1} tokens but the model only {vocab_size} embeddings",
            "this is another model's tokenizer: copy the files that belong to the weights",
        )
    if not tokens or not isinstance(text, str) or not text.strip():
        raise refused(path, "its tokenizer makes nothing of a sentence", "fetch its files anew")
    if tokenizer.eos_token_id is None:
        raise refused(path, "its tokenizer names no eos_token", "add it to tokenizer_config.json")
    if tokenizer.chat_template:
        check_chat_template(tokenizer)
