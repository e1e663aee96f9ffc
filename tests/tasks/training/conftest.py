"""Tiny random models for the training tests."""

from collections.abc import Callable

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

VOCAB = 96


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny_model() -> Callable[..., Qwen3ForCausalLM]:
    """`tiny_model(seed)`: a random fp32 Qwen3 with 2 layers, hidden size 64 and 96 entries."""

    def make(seed: int = 0, tied: bool = True) -> Qwen3ForCausalLM:
        torch.manual_seed(seed)
        config = Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=128,
            tie_word_embeddings=tied,
            initializer_range=0.2,
        )
        return Qwen3ForCausalLM(config).float()

    return make
