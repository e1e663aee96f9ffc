"""The published benchmarks: one record each, which says all that distinguishes it.

Data sets and prompts of the reasoning benchmarks are those of the evaluation harness that the paper builds on
(ruikangliu/Quantized-Reasoning-Models, lighteval_custom/tasks); sampling is the evaluation's own setting.

The paper's Figure 1 does not name the harness of its commonsense benchmarks: data sets, wording and metrics are
EleutherAI/lm-evaluation-harness's, zero-shot.  Of its two metrics the figure is acc_norm, the accuracy by probability
per character, as where quantized models are compared (spcl/QuaRot, fake_quant/main.py); WinoGrande has acc alone, which
acc_norm is where all options share their continuation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tasks.data.commonsense import ReadRow, arc, hellaswag, piqa, winogrande
from tasks.data.fields import FieldMap
from tasks.data.livecodebench import livecodebench_example

TaskKind = Literal["math", "choice", "code", "loglikelihood"]
"""How a problem becomes a prompt and a response a verdict: "math", free-form with a boxed answer; "choice", one of four
options, permuted for each seed; "code", a program that has to pass tests; "loglikelihood", the most probable of given
options, where nothing is sampled."""
BenchmarkName = Literal[
    "aime_120", "math_500", "gsm8k", "gpqa_diamond", "livecodebench_v4_v5",
    "winogrande", "hellaswag", "arc_easy", "arc_challenge", "piqa",
]  # fmt: skip

HUB = "hub"
"""In place of a folder: the benchmark's own data sets on the hub."""

ARC_REVISION = "210d026faf9955653af8916fad021475a3f00453"
ARC_COLUMNS = ("id", "question", "choices", "answerKey")
MATH_SUFFIX = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class HubDataset:
    """A data set on the hub at a commit."""

    source: str
    split: str
    revision: str | None
    subset: str | None = None
    tier: str = ""
    """Of all its problems, where a benchmark has several data sets; else the tier column counts."""


@dataclass(frozen=True)
class RowForm:
    """Rows that are more than plain columns: those that are published, and how a row is read."""

    columns: tuple[str, ...]
    read: ReadRow


@dataclass(frozen=True)
class Benchmark:
    """`fields`: the columns, on the hub and in a local copy alike; id and tier are optional in a copy."""

    kind: TaskKind
    datasets: tuple[HubDataset, ...]
    fields: FieldMap | RowForm
    num_problems: int
    licence: str
    prompt_suffix: str = ""
    access: str = ""
    """What the hub asks for before it gives the data, where that is more than a network."""


BENCHMARKS: dict[BenchmarkName, Benchmark] = {
    # The mean over the 120 problems is 3/4 of AIME 2022-2024's accuracy and 1/4 of AIME 2025's (make_stats_table.py).
    "aime_120": Benchmark(
        kind="math",
        datasets=(
            # No commit of this data set is known to us: its newest is asked for, and enters the key.
            HubDataset("xiaoyuanliu/AIME90", "train", None, tier="2022-2024"),
            HubDataset("yentinglin/aime_2025", "train", "6f71d77b0b89b9dabe07ab466c51df33f514df7f", tier="2025"),
        ),
        fields=FieldMap(prompt="problem", answer="answer", tier="year"),
        num_problems=120,
        licence="the problems are the MAA's",
        prompt_suffix=MATH_SUFFIX,
    ),
    "math_500": Benchmark(
        kind="math",
        datasets=(HubDataset("HuggingFaceH4/MATH-500", "test", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"),),
        fields=FieldMap(prompt="problem", answer="answer", tier="level", id="unique_id"),
        num_problems=500,
        licence="MIT",
        prompt_suffix=MATH_SUFFIX,
    ),
    "gsm8k": Benchmark(
        kind="math",
        datasets=(HubDataset("openai/gsm8k", "test", "740312add88f781978c0658806c59bc2815b9866", subset="main"),),
        fields=FieldMap(prompt="question", answer="answer", answer_rule="hash", id="id"),
        num_problems=1319,
        licence="MIT",
        prompt_suffix=MATH_SUFFIX,
    ),
    "gpqa_diamond": Benchmark(
        kind="choice",
        datasets=(
            HubDataset("Idavidrein/gpqa", "train", "633f5ee89ab8ad4522a9f850766b73f62147ffdd", subset="gpqa_diamond"),
        ),
        fields=FieldMap(
            prompt="Question",
            answer="Correct Answer",
            choices=("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
            tier="High-level domain",
            id="Record ID",
        ),
        num_problems=198,
        licence="CC BY 4.0",
        # So that its questions stay out of training corpora.
        access="GPQA is gated: accept its terms there, then `hf auth login`",
    ),
    "livecodebench_v4_v5": Benchmark(
        kind="code",
        datasets=(
            HubDataset(
                "lighteval/code_generation_lite", "test", "89e5fc5c2a8e748f50e95bc7235fab2372d49bfa", subset="v4_v5"
            ),
        ),
        fields=RowForm(
            (
                "question_id",
                "question_content",
                "starter_code",
                "difficulty",
                "public_test_cases",
                "private_test_cases",
                "metadata",
            ),
            livecodebench_example,
        ),
        num_problems=268,
        licence="CC, as its page says; the problems are those of AtCoder, LeetCode and Codeforces",
    ),
    "winogrande": Benchmark(
        kind="loglikelihood",
        datasets=(
            HubDataset(
                "allenai/winogrande", "validation", "01e74176c63542e6b0bcb004dcdea22d94fb67b5", subset="winogrande_xl"
            ),
        ),
        fields=RowForm(("sentence", "option1", "option2", "answer"), winogrande),
        num_problems=1267,
        licence="CC BY",
    ),
    "hellaswag": Benchmark(
        kind="loglikelihood",
        datasets=(HubDataset("Rowan/hellaswag", "validation", "218ec52e09a7e7462a5400043bb9a69a41d06b76"),),
        fields=RowForm(("activity_label", "ctx_a", "ctx_b", "endings", "label"), hellaswag),
        num_problems=10042,
        licence="MIT",
    ),
    "arc_easy": Benchmark(
        kind="loglikelihood",
        datasets=(HubDataset("allenai/ai2_arc", "test", ARC_REVISION, subset="ARC-Easy"),),
        fields=RowForm(ARC_COLUMNS, arc),
        num_problems=2376,
        licence="CC BY-SA 4.0",
    ),
    "arc_challenge": Benchmark(
        kind="loglikelihood",
        datasets=(HubDataset("allenai/ai2_arc", "test", ARC_REVISION, subset="ARC-Challenge"),),
        fields=RowForm(ARC_COLUMNS, arc),
        num_problems=1172,
        licence="CC BY-SA 4.0",
    ),
    # Parquet files of ybisk/piqa, which is a script that `datasets` no longer runs.
    "piqa": Benchmark(
        kind="loglikelihood",
        datasets=(HubDataset("baber/piqa", "validation", "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1"),),
        fields=RowForm(("goal", "sol1", "sol2", "label"), piqa),
        num_problems=1838,
        licence="AFL-3.0",
    ),
}
