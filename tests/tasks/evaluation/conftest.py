"""A character-level tokenizer, a random Qwen3 of a few thousand parameters, some problems, an engine that recites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tasks.evaluation import harness
from tasks.sampling.engine import Completion, Request, SamplingParams
from tasks.sampling.journal import FILE, Journal
from tasks.sampling.sampler import Sampler

TEMPLATE = (
    "{% for m in messages %}<user>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<model>{% if enable_thinking is defined and not enable_thinking %}<think></think>"
    "{% endif %}{% endif %}"
)
SPECIALS = ["<pad>", "<end>", "<user>", "<model>", "<think>", "</think>"]
PROBLEMS = [
    ("add", "1+1=", "", "2", "easy"),
    ("subtract", "5-2=", "", "3", "easy"),
    ("multiply", "6*7=", "", "42", "hard"),
    ("divide", "9/3=", "", "3", "hard"),
    ("none", "8=", "", "8", ""),
]


def character_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *map(chr, range(32, 127)), "\n"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<end>",
        pad_token="<pad>",
        additional_special_tokens=["<user>", "<model>", "<think>", "</think>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder whose every token is about equally likely."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer()


@pytest.fixture
def write_data(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: Sequence[Sequence[str]] = PROBLEMS, name: str = "data") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        columns = ["id", "prompt", "response", "answer", "tier"]
        pd.DataFrame(rows, columns=columns).astype(str).assign(details="").to_parquet(folder / "data.parquet")
        return folder

    return write


@dataclass
class RecitingEngine:
    """Answers each prompt with a fixed text; finishes in reverse order; dies after `lives` completions."""

    tokenizer: Any
    answers: dict[str, str]
    lives: int = 1_000_000
    requests: list[Request] = field(default_factory=list)

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        on_finished: Callable[[int, Completion], None] | None = None,
        on_tokens: Callable[[], None] | None = None,
    ) -> list[Completion]:
        completions: dict[int, Completion] = {}
        for index in reversed(range(len(requests))):
            if self.lives == 0:
                self.die()
            self.lives -= 1
            self.requests.append(requests[index])
            text = self.answers[self.tokenizer.decode(requests[index].prompt_ids)]
            token_ids = (*self.tokenizer(text, add_special_tokens=False)["input_ids"], *sampling.stop_token_ids[:1])
            cut = len(token_ids) > sampling.max_new_tokens
            token_ids = token_ids[: sampling.max_new_tokens]
            completions[index] = Completion(token_ids, (0.0,) * len(token_ids), "length" if cut else "stop")
            if on_finished is not None:
                on_finished(index, completions[index])
        return [completions[index] for index in range(len(requests))]

    def die(self) -> None:
        raise KeyboardInterrupt

    def load_weights(self, model: torch.nn.Module) -> None:
        raise AssertionError("an evaluation never changes weights")

    def close(self) -> None:
        self.answers = {}


@pytest.fixture
def run_harness() -> Callable[..., Any]:
    """harness.run on an engine, with a journal in the scratch folder."""

    def run(evaluation: Any, engine: Any, score: Any, scratch: Path, progress: Any = lambda done, total: None) -> Any:
        with Journal(scratch / FILE) as journal:
            sampler = Sampler(engine, evaluation.sampling, evaluation.config.generation, journal, {"engine": "recites"})
            return harness.run(evaluation, sampler, score, scratch, progress)

    return run


@pytest.fixture
def reciting_engine(tokenizer: PreTrainedTokenizerFast) -> Callable[..., RecitingEngine]:
    """Right on add, subtract and multiply, wrong on divide, and too long on none."""

    def build(**options: Any) -> RecitingEngine:
        says = {
            "1+1=": "<think>1+1 is \\boxed{1}, no</think>\\boxed{2}",
            "5-2=": "<think></think>\\boxed{3}",
            "6*7=": "<think>40+2</think>\\boxed{42}",
            "9/3=": "<think></think>\\boxed{9}",
            "8=": "<think>" + "8" * 60,
        }
        answers = {f"<user>{prompt}<end><model>": text for prompt, text in says.items()}
        return RecitingEngine(tokenizer, answers, **options)

    return build
