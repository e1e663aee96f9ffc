"""The decode loop against plain one-sequence decoding without cache, padding or batching."""

import math

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from quant.grids.scheme import Scheme
from quant.student.linear import prepare, quantized_linears
from quant.student.sites import quantizers_disabled
from tasks.checkpoints.models import load_model
from tasks.runtime.stage import StageError
from tasks.sampling import decoding
from tasks.sampling.draws import uniform_streams
from tasks.sampling.engine import Completion, EngineOptions, Request, SamplingParams
from tasks.sampling.registry import open_engine
from tasks.sampling.transformers_engine import TransformersEngine
from tests.quant.plain import convert

VOCABULARY = 40
LIMIT = 48
GREEDY_8 = SamplingParams(0.0, 1.0, 8, (1,))
SIZES = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=LIMIT,
    initializer_range=0.4,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=1,
)


def make_model(family: str = "qwen3") -> PreTrainedModel:
    torch.manual_seed(3)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES))
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}))
    return Qwen3ForCausalLM(Qwen3Config(**SIZES))


def make_requests(num: int, seed: int = 0) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (num,), generator=generator).tolist()
    prompts = [tuple(torch.randint(2, VOCABULARY, (n,), generator=generator).tolist()) for n in lengths]
    return [Request(prompt, seed=100 + i) for i, prompt in enumerate(prompts)]


@torch.no_grad()
def decode_plainly(model: PreTrainedModel, request: Request, sampling: SamplingParams) -> Completion:
    """One sequence, whole prefix recomputed per token, scalar inverse CDF over sorted probabilities."""
    model.eval()
    ids, logprobs = list(request.prompt_ids), []
    draws = uniform_streams([request.seed], sampling.max_new_tokens)[0].tolist()
    for step in range(sampling.max_new_tokens):
        logits = model(torch.tensor([ids])).logits[0, -1].double()
        if sampling.temperature == 0:
            logp = logits.log_softmax(-1)
            token = int(logp.argmax())
        else:
            logp = (logits / sampling.temperature).log_softmax(-1)
            probabilities = logp.exp().tolist()
            order = list(range(len(probabilities)))
            if sampling.top_p < 1:
                order.sort(key=lambda v: -probabilities[v])
            kept, mass = [], 0.0
            for candidate in order:
                if sampling.top_p < 1 and mass >= sampling.top_p:
                    break
                kept.append(candidate)
                mass += probabilities[candidate]
            target, below = draws[step] * mass, 0.0
            for token in kept:
                below += probabilities[token]
                if below > target:
                    break
        ids.append(token)
        logprobs.append(float(logp[token]))
        if token in sampling.stop_token_ids:
            return Completion(tuple(ids[len(request.prompt_ids) :]), tuple(logprobs), "stop")
        if len(ids) >= LIMIT:
            break
    return Completion(tuple(ids[len(request.prompt_ids) :]), tuple(logprobs), "length")


def assert_same(found: list[Completion], expected: list[Completion]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-4)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(0.0, 1.0, 30, (1, 5)),
        SamplingParams(1.0, 1.0, 30, (1, 5, 9)),
        SamplingParams(0.8, 0.9, 200, (1, 5)),
    ],
    ids=["greedy", "sampled", "nucleus-up-to-the-context-limit"],
)
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_equals_plain_decoding(family: str, sampling: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 30)
    monkeypatch.setattr(decoding, "SLOT_STEP", 3)
    monkeypatch.setattr(decoding, "ROW_STEP", 2)
    model = make_model(family)
    requests = make_requests(9)
    requests += [Request(requests[4].prompt_ids, seed=7), Request(requests[4].prompt_ids, seed=8)]
    expected = [decode_plainly(model, request, sampling) for request in requests]
    found = TransformersEngine(model, 0, batch_size=7).generate(requests, sampling)
    assert_same(found, expected)
    reasons = {completion.finish_reason for completion in expected}
    assert "stop" in reasons


def test_a_sample_depends_on_its_seed_and_not_on_its_place() -> None:
    model, sampling = make_model(), SamplingParams(1.0, 0.95, 12, (1,))
    requests = make_requests(6)
    together = TransformersEngine(model, 0).generate(requests, sampling)
    assert together == TransformersEngine(model, 0).generate(requests, sampling)
    for order in ([5, 0, 3, 1, 4, 2], [2]):
        engine = TransformersEngine(model, 0, batch_size=4)
        assert_same(engine.generate([requests[i] for i in order], sampling), [together[i] for i in order])
    reseeded = [Request(request.prompt_ids, request.seed + 1000) for request in requests]
    other = TransformersEngine(model, 0).generate(reseeded, sampling)
    assert all(a.token_ids != b.token_ids for a, b in zip(together, other, strict=True))


def test_token_budget_bounds_the_batch_but_admits_single_sequences() -> None:
    model, sampling = make_model(), SamplingParams(0.0, 1.0, 4, ())
    requests = [Request((2, 3, 4, 5), seed=i) for i in range(5)]
    sizes: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    TransformersEngine(model, 0, token_budget=17).generate(requests, sampling)
    # One prompt, shared by the two rows of a batch, is prefilled once.
    assert sizes == [1, 2, 2, 2, 1, 2, 2, 2, 1, 1, 1, 1]
    sizes.clear()
    TransformersEngine(model, 0, token_budget=1).generate(requests[:2], sampling)
    assert sizes == [1] * 8
    handle.remove()


def test_on_finished_sees_every_completion_once_and_early_ones_first() -> None:
    model, requests = make_model(), make_requests(8)
    sampling = SamplingParams(1.0, 1.0, 30, (1, 5, 9))
    seen: list[tuple[int, Completion]] = []
    found = TransformersEngine(model, 0).generate(requests, sampling, lambda i, c: seen.append((i, c)))
    assert dict(seen) == dict(enumerate(found)) and len(seen) == 8
    lengths = [len(completion.token_ids) for _, completion in seen]
    assert lengths == sorted(lengths) and len(set(lengths)) > 1


def test_model_is_left_as_it_was() -> None:
    model = make_model().train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    implementation = model.config._attn_implementation
    TransformersEngine(model, 0).generate(make_requests(2), SamplingParams(1.0, 1.0, 2, ()))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.config._attn_implementation == implementation
    assert torch.is_grad_enabled()


def test_too_long_prompts_are_refused_before_any_computation() -> None:
    model = make_model()
    model.register_forward_pre_hook(lambda *args: pytest.fail("computed"))
    requests = [Request((2,), 0), Request((2,) * LIMIT, 0)]
    with pytest.raises(ValueError, match=f"request 1 has {LIMIT} tokens and the context limit is {LIMIT}"):
        TransformersEngine(model, 0).generate(requests, SamplingParams(0.0, 1.0, 4, ()))


def test_sliding_window_models_are_refused() -> None:
    config = Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(ValueError, match="sliding_attention"):
        TransformersEngine(Qwen3ForCausalLM(config), 0)


def test_half_precision_stays_in_its_dtype() -> None:
    model = make_model().to(torch.bfloat16)
    dtypes: set[torch.dtype] = set()
    model.lm_head.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    completions = TransformersEngine(model, 0).generate(make_requests(3), SamplingParams(1.0, 0.9, 5, ()))
    assert dtypes == {torch.bfloat16}
    assert all(len(completion.token_ids) == 5 for completion in completions)


def test_a_student_generates_with_its_rounded_weights() -> None:
    sampling, requests = SamplingParams(1.0, 0.9, 10, (1,)), make_requests(5)
    plain = TransformersEngine(make_model(), 0).generate(requests, sampling)
    student = prepare(make_model(), Scheme(bits=3, group_size=8), None, "recomputed")
    found = TransformersEngine(student, 0).generate(requests, sampling)
    assert found != plain
    assert all(module.materialized_weight is None for _, module in quantized_linears(student))
    assert found == TransformersEngine(convert(student), 0).generate(requests, sampling)


@pytest.mark.parametrize(("family", "learned"), [("qwen2", False), ("qwen3", True), ("llama", True)])
def test_a_quantized_cache_decodes_as_whole_sequences_do(
    family: str, learned: bool, make_student, save_checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left padding, shared prompts and rows that leave, at W4A4KV4."""
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 30)
    monkeypatch.setattr(decoding, "SLOT_STEP", 3)
    monkeypatch.setattr(decoding, "ROW_STEP", 2)
    # In float32 the other shape of the sums alone flips a 4-bit rounding here and there, in float64 it does not.
    model = load_model(save_checkpoint(make_student(family, learned=learned)), torch.float64)
    requests = make_requests(5)
    requests += [Request(requests[4].prompt_ids, seed=7)]
    sampling = SamplingParams(1.0, 0.9, 12, tuple(range(1, 320, 6)))
    expected = [decode_plainly(model, request, sampling) for request in requests]
    assert_same(TransformersEngine(model, 0, batch_size=4).generate(requests, sampling), expected)
    assert len({len(completion.token_ids) for completion in expected}) > 1
    with quantizers_disabled(model):
        off = TransformersEngine(model, 0, batch_size=4).generate(requests, sampling)
    assert all(abs(a.logprobs[0] - b.logprobs[0]) > 1e-3 for a, b in zip(off, expected, strict=True))


def test_a_checkpoint_is_opened_behind_its_quantizers(make_student, save_checkpoint) -> None:
    folder, sampling, requests = save_checkpoint(make_student("qwen3", learned=True)), GREEDY_8, make_requests(3)
    found = open_engine("transformers", folder, EngineOptions(128, "float32")).generate(requests, sampling)
    model = load_model(folder, torch.float32)
    assert found == TransformersEngine(model, 0).generate(requests, sampling)
    with quantizers_disabled(model):
        assert found != TransformersEngine(model, 0).generate(requests, sampling)


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_generates_under_autocast(family: str) -> None:
    sampling, requests = SamplingParams(0.0, 1.0, 6, ()), make_requests(3)
    found = TransformersEngine(make_model(family), 0, autocast=True).generate(requests, sampling)
    exact = TransformersEngine(make_model(family), 0).generate(requests, sampling)
    for one, other in zip(found, exact, strict=True):
        assert one.logprobs[0] == pytest.approx(other.logprobs[0], abs=0.3) and one.logprobs != other.logprobs


def test_load_weights_and_open_engine(make_model_folder) -> None:
    folder = make_model_folder(dtype=torch.float32)
    sampling, requests = GREEDY_8, make_requests(4)
    first, second = load_model(folder, torch.float32), load_model(folder, torch.float32)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(-0.7)
    engine = open_engine("transformers", folder, EngineOptions(128, "float32", batch_size=2))
    expected = TransformersEngine(first, 0).generate(requests, sampling)
    assert_same(engine.generate(requests, sampling), expected)
    engine.load_weights(second)
    renewed = engine.generate(requests, sampling)
    assert renewed != expected
    assert_same(renewed, TransformersEngine(second, 0).generate(requests, sampling))
    engine.close()
    with pytest.raises(ValueError, match="no engine 'tgi': take 'transformers' or 'vllm'"):
        open_engine("tgi", folder, EngineOptions(128))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["embed_tokens", "layers.1.mlp.down_proj", "layers.0.input_layernorm", "model.norm"])
def test_weights_that_are_not_finite_are_told(where: str, bad: float) -> None:
    model = make_model("qwen2")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if where in name:
                parameter.view(-1)[5] = bad
    engine, pair = TransformersEngine(model, 0), ((5, 6, 7), (0, 1))
    for ask in (lambda: engine.generate([Request((0, 5, 0), 1)], GREEDY_8), lambda: engine.loglikelihood([pair])):
        with pytest.raises(StageError, match="the model's logits are not finite"):
            ask()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"max_new_tokens": 0}, "max_new_tokens")],
)
def test_bad_sampling_parameters_are_refused(change: dict[str, float], message: str) -> None:
    fields = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 1, "stop_token_ids": (), **change}
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)  # type: ignore[arg-type]


def test_empty_prompts_and_negative_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one prompt token"):
        Request((), 0)
    with pytest.raises(ValueError, match="seed"):
        Request((1,), -1)


def test_every_decoded_token_is_a_sign_of_life() -> None:
    signs: list[int] = []
    engine = TransformersEngine(make_model(), 0, batch_size=2)
    found = engine.generate(make_requests(4), SamplingParams(0.0, 1.0, 5, ()), on_tokens=lambda: signs.append(1))
    assert {len(completion.token_ids) for completion in found} == {5}
    assert len(signs) == 2 * 5, "two batches of five steps"
