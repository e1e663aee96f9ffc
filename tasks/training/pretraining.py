"""Pretraining of the bundled model: its curriculum of problems, drills and stories, and the model itself."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from quant.decoder import EMBEDDING
from tasks.data.bundled_problems import bundled_drills, bundled_problems, bundled_stories
from tasks.data.bundled_tokenizer import build_tokenizer
from tasks.data.prompts import encode_example
from tasks.runtime.stage import Context, Metrics
from tasks.training.batches import by_length
from tasks.training.config import LOG_FILE, PretrainConfig
from tasks.training.loop import Batch, StepBatches, train
from tasks.training.objectives import SFTObjective
from tasks.training.optimizer import muon_adam
from tasks.training.student_training import write_log

_DRILLS_PER_ROW = 10
_RESULT_SIGN = " = "

Example = tuple[list[int], list[int]]
"""(input ids, indices of the tokens that are predicted)."""


def train_from_nothing(config: PretrainConfig, context: Context) -> Metrics:
    """The body of `pretrain`."""
    tokenizer = build_tokenizer()
    model = build_model(config, tokenizer).to(context.device)  # type: ignore[arg-type]  # transformers wraps `to`
    objective = SFTObjective(model)
    optimizers = muon_adam(objective, config.loop, adam_pattern=EMBEDDING, adam_learning_rate=config.adam_learning_rate)
    source = Curriculum(config, tokenizer)
    rows = train(
        objective,
        source,
        config.loop,
        optimizers,
        scratch=context.scratch,
        device=context.device,
        progress=context.progress,
    )
    save(model, tokenizer, context.output)
    write_log(rows, context.output / LOG_FILE)
    return {"final_loss": rows[-1]["loss"], "num_parameters": sum(p.numel() for p in model.parameters())}


def build_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The fp32 model with weights drawn from the loop's seed."""
    torch.manual_seed(config.loop.seed)
    architecture = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # The fused attention kernel's bf16 backward pass is slow on a CPU.
    return Qwen3ForCausalLM._from_config(architecture, attn_implementation="eager", dtype=torch.float32)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the bf16 checkpoint folder with the paper's sampling as generation defaults."""
    model.to(torch.bfloat16)  # type: ignore[arg-type]
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_p=0.95,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Curriculum:
    """Batches as a pure function of (seed, step): problems of all tiers, a falling share of drills, a few stories."""

    def __init__(self, config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config, self.tokenizer = config, tokenizer

    def drill_share(self, step: int) -> float:
        done = min(1.0, step / (self.config.drill_ramp * self.config.loop.steps))
        return (1 - done) * self.config.first_drill_share + done * self.config.last_drill_share

    def step_batches(self, step: int) -> StepBatches:
        loop = self.config.loop
        seed = loop.seed * 1_000_003 + step
        num_drills = round(self.drill_share(step) * loop.batch_size)
        num_stories = round(self.config.story_share * loop.batch_size)
        rows = bundled_problems("train", loop.batch_size - num_drills - num_stories, seed)
        rows += bundled_stories("train", num_stories, seed)
        examples = [self._example(row["prompt"], row["response"]) for row in rows] + self._drills(num_drills, seed)
        groups = by_length(examples, lambda example: len(example[0]), loop.micro_batch_size)
        num_targets = sum(len(predicted) for _, predicted in examples)
        share = num_drills / loop.batch_size
        return StepBatches([_collate(group) for group in groups], float(num_targets), {"drill_share": share})

    def _example(self, prompt: str, response: str) -> Example:
        ids, prompt_length = encode_example(self.tokenizer, prompt, response)
        return ids, list(range(max(1, prompt_length), len(ids)))

    def _drills(self, num_rows: int, seed: int) -> list[Example]:
        """Rows of equations, of which only the results and the line ends after them are predicted."""
        drills = bundled_drills(num_rows * _DRILLS_PER_ROW, seed)
        sign, line_end = (int(self.tokenizer.vocab[token]) for token in (_RESULT_SIGN, "\n"))
        examples = []
        for i in range(0, len(drills), _DRILLS_PER_ROW):
            text = "".join(drill + "\n" for drill in drills[i : i + _DRILLS_PER_ROW])
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            examples.append((ids, _result_indices(ids, sign, line_end)))
        return examples


def _collate(examples: list[Example]) -> Batch:
    """Pad on the right to the longest, in the layout of `tasks.training.batches`."""
    length = max(len(ids) for ids, _ in examples)
    # Any id serves as padding: the mask hides it and nothing is predicted from it.
    input_ids = [ids + [0] * (length - len(ids)) for ids, _ in examples]
    mask = [[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in examples]
    positions = [row * length + index - 1 for row, (_, predicted) in enumerate(examples) for index in predicted]
    targets = [ids[index] for ids, predicted in examples for index in predicted]
    tensors = {"input_ids": input_ids, "attention_mask": mask, "positions": positions, "targets": targets}
    return {name: torch.tensor(values) for name, values in tensors.items()}


def _result_indices(ids: list[int], sign: int, line_end: int) -> list[int]:
    """Indices of the tokens after a result sign up to the line end that closes it."""
    indices, inside = [], False
    for index, token in enumerate(ids):
        if inside:
            indices.append(index)
        inside = token == sign or (inside and token != line_end)
    return indices
