"""What a generation's configuration refuses, and what of it enters a key."""

import pytest
from pydantic import ValidationError

from tasks.sampling.config import CalibrationGeneration, GenerationConfig, RolloutGeneration
from tasks.sampling.registry import ENGINES

KINDS = (GenerationConfig, CalibrationGeneration, RolloutGeneration)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"engine": "sglang"}, "no engine 'sglang': take 'transformers' or 'vllm'"),
        ({"tensor_parallel": 2}, "set engine='vllm' too"),
        ({"data_parallel": 0}, "data_parallel"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 1e-30}, "take 0 for greedy decoding"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization"),
        ({"stall_seconds": 10.0, "stall_limit_seconds": 5.0}, "a stall is reported before it ends the stage"),
        ({"enginge": "vllm"}, "enginge"),
    ],
)
def test_every_stage_refuses_the_same(kind, wrong, message) -> None:
    with pytest.raises(ValidationError, match=message):
        kind(**wrong)


def test_what_vllm_alone_can() -> None:
    found = GenerationConfig(engine="vllm", tensor_parallel=2, data_parallel=4)
    assert (found.tensor_parallel, found.data_parallel) == (2, 4)
    assert GenerationConfig(data_parallel=2).data_parallel == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": 0.0}, "greater than 0"),
        ({"data_parallel": 2}, "one engine"),
        ({"engine": "vllm", "tensor_parallel": 2}, "one engine"),
        ({"dtype": "float32"}, "set mixed_precision"),
    ],
)
def test_rollouts_refuse_what_does_not_fit_training(wrong, message) -> None:
    with pytest.raises(ValidationError, match=message):
        RolloutGeneration(**wrong)


def test_a_stages_own_defaults_hold_where_a_part_is_set() -> None:
    assert RolloutGeneration.model_validate({"engine": "vllm", "dtype": "float32"}).temperature == 1.0
    assert CalibrationGeneration.model_validate({"top_p": 1.0}).batch_size == 64


def test_every_engine_says_what_computes() -> None:
    assert all(kind.packages for kind in ENGINES.values())
