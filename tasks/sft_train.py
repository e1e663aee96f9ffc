"""sft_train: train the quantized student on reasoning traces with cross entropy (paper, sections 3.1 and 3.2).

The defaults are those of Table 6 for a GPTQ start; for an RTN start it has learning_rate=2e-5.
Departure: Table 6 leaves open how its global batch of 32 is cut; its 4 accumulation steps are read as micro-batches
of 8.
"""

from __future__ import annotations

from pathlib import Path

from tasks.checkpoints.models import load_student, load_tokenizer
from tasks.runtime.stage import Context, Metrics, stage
from tasks.training.batches import TokenBatches
from tasks.training.objectives import SFTObjective
from tasks.training.student import StudentConfig, select_trainable
from tasks.training.student_training import TraceConfig, read_examples, train_student


class SFTTrainConfig(StudentConfig, TraceConfig):
    steps: int = 6000
    learning_rate: float = 1e-6
    warmup_steps: int = 180
    batch_size: int = 32
    micro_batch_size: int = 8


@stage(
    kind="checkpoint",
    reads={"student": "model", "data": "train_data"},
    gives="model",
    log="training_log.jsonl",
    packages=lambda config: ("torch", "transformers"),
)
def sft_train(config: SFTTrainConfig, context: Context, *, student: Path, data: Path) -> Metrics:
    """Minimise the cross entropy of the response tokens of `data`."""
    examples, counts = read_examples(data, load_tokenizer(student), config)
    model = load_student(student, config.scale_mode, context.device, config.attention)
    select_trainable(model, config)
    metrics = train_student(model, SFTObjective(model), TokenBatches(examples, config), config, context, student)
    return {**metrics, **counts}
