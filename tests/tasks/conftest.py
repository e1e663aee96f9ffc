"""Tiny model folders of the three supported architectures, with a byte tokenizer, made in a tenth of a second."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from tasks.data.hub import commit_of

SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
CONFIGS = {
    "qwen2": lambda: Qwen2Config(**SMALL, tie_word_embeddings=False),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=32, tie_word_embeddings=True),
    "llama": lambda: LlamaConfig(**SMALL, tie_word_embeddings=False),
}


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    def make(template: str | None = TEMPLATE, **options) -> PreTrainedTokenizerFast:
        vocabulary = {
            token: index for index, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])
        }
        backend = Tokenizer(models.BPE(vocabulary, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
        special = {"bos_token": "<s>", "eos_token": "<|end|>", **options}
        return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)

    return make


@pytest.fixture
def hub(monkeypatch) -> Iterator[dict[tuple[str, str | None], str]]:
    """A hub that knows the commits put in here, by data set and revision, and nothing else."""
    commits: dict[tuple[str, str | None], str] = {}

    def dataset_info(self, name, revision=None, **options):
        if (name, revision) not in commits:
            raise ConnectionError("Name or service not known")
        return SimpleNamespace(sha=commits[name, revision])

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    commit_of.cache_clear()
    yield commits
    commit_of.cache_clear()


@pytest.fixture
def make_model_folder(tmp_path: Path, make_tokenizer) -> Callable[..., Path]:
    """A plain checkpoint folder: make_model_folder("qwen3", dtype=torch.float32, tokenizer=...)."""

    def make(kind: str = "qwen3", dtype: torch.dtype = torch.bfloat16, name: str = "source", tokenizer=None) -> Path:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32)
        with torch.no_grad():  # transformers starts biases at 0 and norms at 1, where mistakes would not show
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        folder = tmp_path / name
        model.to(dtype).save_pretrained(folder)
        (tokenizer or make_tokenizer()).save_pretrained(folder)
        return folder

    return make
