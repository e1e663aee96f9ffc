import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tasks.data.bundled_problems import bundled_problems
from tasks.data.bundled_tokenizer import build_tokenizer
from tasks.pretrain import PretrainConfig, pretrain
from tasks.runtime.stage import Context
from tasks.training.config import LoopConfig
from tasks.training.pretraining import Curriculum, build_model

BUNDLED = Path(__file__).parents[2] / "artifacts" / "bundled" / "model"


def _config(**loop) -> PretrainConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 1, "num_heads": 2, "num_key_value_heads": 1}
    settings = {"steps": 4, "learning_rate": 0.02, "batch_size": 8, "micro_batch_size": 4, "checkpoint_every": 2} | loop
    return PretrainConfig(**sizes, head_dim=16, story_share=0.125, loop=LoopConfig(**settings))


def _run(folder: Path, **loop) -> Path:
    context = Context(output=folder / "output", scratch=folder / "scratch")
    context.output.mkdir(parents=True)
    context.scratch.mkdir()
    pretrain(_config(**loop), context)
    return context.output


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_stage_writes_a_loadable_bf16_checkpoint_and_the_same_bytes_twice(tmp_path):
    first, second = _run(tmp_path / "a"), _run(tmp_path / "b")
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    model = AutoModelForCausalLM.from_pretrained(first, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(first).eos_token_id
    assert model.generation_config.temperature == 0.6
    log = [json.loads(line) for line in (first / "training_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [1, 2, 3, 4]


def test_training_lowers_the_loss(tmp_path):
    output = _run(tmp_path, steps=30)
    losses = [json.loads(line)["loss"] for line in (output / "training_log.jsonl").read_text().splitlines()]
    assert sum(losses[-5:]) / 5 < 0.8 * losses[0]


def test_initial_weights_follow_the_seed(tokenizer):
    weights = [build_model(_config(seed=seed), tokenizer).model.embed_tokens.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_batches_are_a_function_of_seed_and_step(tokenizer):
    sources = [Curriculum(_config(), tokenizer) for _ in range(2)]
    sources[0].step_batches(2)
    first, again = (source.step_batches(3) for source in sources)
    other = sources[0].step_batches(4)
    for a, b in zip(first.micro_batches, again.micro_batches, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(first.micro_batches[0]["targets"], other.micro_batches[0]["targets"])


def _predicted_rows(batch, tokenizer) -> list[tuple[str, str]]:
    """(row's text, predicted tokens' text) of every row of a micro-batch, read back from the tensors."""
    length = batch["input_ids"].shape[1]
    rows = []
    for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
        chosen = (batch["positions"] // length) == row
        columns = batch["positions"][chosen] % length
        assert torch.equal(ids[columns + 1], batch["targets"][chosen])
        rows.append((tokenizer.decode(ids[mask.bool()]), tokenizer.decode(batch["targets"][chosen])))
    return rows


def test_only_responses_drill_results_and_stories_are_predicted(tokenizer):
    step = Curriculum(_config(), tokenizer).step_batches(0)
    rows = [row for batch in step.micro_batches for row in _predicted_rows(batch, tokenizer)]
    kinds = {"problem": 0, "drill": 0, "story": 0}
    for text, predicted in rows:
        if "<|assistant|>" in text:
            kinds["problem"] += 1
            assert predicted == text.split("<|assistant|>")[1]
            assert predicted.endswith("}<|end|>")
        elif " = " in text:
            kinds["drill"] += 1
            assert predicted == "".join(re.findall(r" = (\d+\n)", text))
        else:
            kinds["story"] += 1
            assert text.endswith(predicted) and predicted.count(".") == text.count(".")
    assert kinds == {"problem": 2, "drill": 5, "story": 1}
    assert step.denominator == sum(len(batch["targets"]) for batch in step.micro_batches)


def test_drill_share_falls_from_first_to_last(tokenizer):
    config = _config(steps=100, warmup_steps=0).model_copy(
        update={"first_drill_share": 0.6, "last_drill_share": 0.2, "drill_ramp": 0.5}
    )
    source = Curriculum(config, tokenizer)
    assert [source.drill_share(step) for step in (0, 25, 50, 99)] == pytest.approx([0.6, 0.4, 0.2, 0.2])


def test_bundled_model_fits_its_promises():
    config = json.loads((BUNDLED / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    inputs = [
        config["hidden_size"],
        config["intermediate_size"],
        config["num_attention_heads"] * config["head_dim"],
    ]
    assert all(size % 128 == 0 for size in inputs), "G128 must divide every linear's input"
    assert sum(path.stat().st_size for path in BUNDLED.parent.rglob("*") if path.is_file()) < 10_000_000
    assert AutoTokenizer.from_pretrained(BUNDLED).get_vocab() == build_tokenizer().get_vocab()


@torch.no_grad()
def test_bundled_model_solves_unseen_problems():
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.bfloat16)
    rows = bundled_problems("test", 24, seed=31, tiers=["2-3", "4"])
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
        )
        for row in rows
    ]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    output = model.generate(**inputs, max_new_tokens=160, do_sample=False)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    correct = [text.endswith(f"</think>\n\\boxed{{{row['answer']}}}") for text, row in zip(texts, rows, strict=True)]
    assert sum(correct) >= 19, texts
