"""Block streaming against a plain reference that keeps the whole model in memory and runs all of it for every group."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from quant.calibration.streaming import Batch, BlockRun, quantize_blocks
from quant.decoder import LINEAR_GROUPS
from quant.grids.affine import fake_quantize, grouped, quantize, rtn
from quant.grids.scheme import Scheme
from quant.methods.gptq import gptq_shared
from quant.methods.options import GPTQOptions, RTNOptions
from quant.methods.registry import METHODS, initializer

SCHEME = Scheme(3, 32, symmetric=False)
SIZES = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tiny_model(architecture):
    torch.manual_seed(0)
    if architecture == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True))
    elif architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    for parameter in model.parameters():  # biases and norms too, so that leaving one out shows
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def tokens(num_padding):
    input_ids_NT = torch.randint(0, 50, (6, 24), generator=torch.Generator().manual_seed(1))
    mask_NT = torch.ones_like(input_ids_NT)
    for row, num in enumerate(num_padding):
        mask_NT[row, 24 - num :] = 0
    return input_ids_NT, mask_NT


class MemoryStream:
    """Blocks of a model in memory; counts the loaded ones that are still alive."""

    def __init__(self, model):
        self.blocks, self.num_blocks = list(model.model.layers), len(model.model.layers)
        self.stored, self.results, self.alive, self.peak = [], {}, [], 0

    def _loaded(self, block):
        gc.collect()
        self.alive = [ref for ref in self.alive if ref() is not None]
        block = copy.deepcopy(block)
        self.alive.append(weakref.ref(block.mlp.down_proj.weight))
        self.alive.append(weakref.ref(block))
        self.peak = max(self.peak, len(self.alive))
        return block

    def num_stored(self):
        return len(self.stored)

    def load(self, index):
        return self._loaded(self.blocks[index])

    def load_stored(self, index):
        return self._loaded(self.stored[index])

    def store(self, index, block, results, further):
        self.results.update({f"model.layers.{index}.{name}": result for name, result in results.items()})
        self.stored.append(copy.deepcopy(block))


class Catcher(nn.Module):
    def forward(self, hidden_states, **inputs):
        self.caught = (hidden_states, inputs)
        return hidden_states


def batches_of(model, input_ids_NT, mask_NT, batch_size=4):
    inner = copy.deepcopy(model.model)
    catcher = Catcher()
    inner.layers = nn.ModuleList([catcher] * model.config.num_hidden_layers)
    batches = []
    for input_ids_BT, mask_BT in zip(input_ids_NT.split(batch_size), mask_NT.split(batch_size), strict=True):
        inner(input_ids=input_ids_BT, attention_mask=mask_BT, use_cache=False)
        hidden_BTH, inputs = catcher.caught
        batches.append(Batch(hidden_BTH, mask_BT, [inputs] * model.config.num_hidden_layers))
    return batches


def whole_model_reference(model, input_ids_NT, mask_NT, scheme):
    """True-sequential GPTQ with the whole model in memory and one sequence at a time."""
    model = copy.deepcopy(model)
    results = {}
    for index, layer in enumerate(model.model.layers):
        for group in LINEAR_GROUPS:
            rows = {name: [] for name in group}
            handles = [
                layer.get_submodule(name).register_forward_pre_hook(lambda _, args, to=rows[name]: to.append(args[0]))
                for name in group
            ]
            for input_ids_T, mask_T in zip(input_ids_NT, mask_NT, strict=True):
                model(input_ids=input_ids_T[mask_T.bool()][None], use_cache=False)
            for name, handle in zip(group, handles, strict=True):
                handle.remove()
                linear = layer.get_submodule(name)
                x_NI = torch.cat([row[0] for row in rows[name]]).double()
                hessian_II = (2 * x_NI.T @ x_NI / len(rows[name])).float()
                results[f"model.layers.{index}.{name}"] = (
                    linear,
                    gptq_shared({"": linear.weight}, hessian_II, scheme, GPTQOptions())[""],
                )
            for name in group:
                linear, result = results[f"model.layers.{index}.{name}"]
                state = result.state
                linear.weight.data = fake_quantize(state.weight, state.scale, state.zero, scheme, torch.float32)
    return {name: result for name, (_, result) in results.items()}


def codes_of(state):
    return quantize(grouped(state.weight, SCHEME), state.scale[..., None], state.zero[..., None], SCHEME)


@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "llama"])
def test_true_sequential_streaming_equals_whole_model(architecture):
    model = tiny_model(architecture)
    input_ids_NT, mask_NT = tokens([0, 5, 0, 11, 3, 0])
    stream, seen = MemoryStream(model), []
    method = initializer("gptq").block_method(GPTQOptions())
    quantize_blocks(
        stream, batches_of(model, input_ids_NT, mask_NT), method, SCHEME, lambda *call: seen.append(call[:2])
    )
    expected = whole_model_reference(model, input_ids_NT, mask_NT, SCHEME)
    assert stream.results.keys() == expected.keys()
    assert seen == [(1, 3), (2, 3), (3, 3)]
    num_codes = num_different = 0
    for name, result in stream.results.items():
        different = codes_of(result.state) != codes_of(expected[name].state)
        num_codes, num_different = num_codes + different.numel(), num_different + int(different.sum())
        assert result.report["error"] == pytest.approx(expected[name].error, rel=0.01)
        # what the block computes with afterwards: the rounded weights, with the bias as it was
        index, inner_name = name.removeprefix("model.layers.").split(".", 1)
        linear = stream.stored[int(index)].get_submodule(inner_name)
        state = result.state
        assert torch.equal(linear.weight, fake_quantize(state.weight, state.scale, state.zero, SCHEME, torch.float32))
        before = model.get_submodule(name).bias
        assert (linear.bias is None and before is None) or torch.equal(linear.bias, before)
    assert num_different <= 0.001 * num_codes  # rounding errors of another summation order may flip a near-tie


def test_one_block_at_a_time_and_resume_gives_the_same_results():
    model = tiny_model("qwen3")
    batches = lambda: batches_of(model, *tokens([0, 5, 0, 11, 3, 0]))  # noqa: E731
    method = initializer("gptq").block_method(GPTQOptions())
    undisturbed = MemoryStream(model)
    quantize_blocks(undisturbed, batches(), method, SCHEME)
    assert undisturbed.peak == 2  # one block and the one weight watched in it

    class Killed(Exception):
        pass

    killed = MemoryStream(model)
    store = killed.store

    def store_two(index, block, results, further):
        if index == 2:
            raise Killed
        store(index, block, results, further)

    killed.store = store_two
    with pytest.raises(Killed):
        quantize_blocks(killed, batches(), method, SCHEME)
    assert killed.num_stored() == 2
    killed.store = store
    quantize_blocks(killed, batches(), method, SCHEME)
    assert killed.peak == 2
    for name, result in undisturbed.results.items():
        assert torch.equal(result.state.weight, killed.results[name].state.weight)
        assert result.report == killed.results[name].report


def test_attention_runs_once_per_batch_until_the_block_is_done(monkeypatch):
    calls = []
    original = Qwen3Attention.forward
    monkeypatch.setattr(Qwen3Attention, "forward", lambda self, *a, **k: calls.append(1) or original(self, *a, **k))
    model = tiny_model("qwen3")
    batches = batches_of(model, *tokens([0] * 6))
    quantize_blocks(MemoryStream(model), batches, initializer("gptq").block_method(GPTQOptions()), SCHEME)
    assert len(calls) == 3 * 2 * len(batches)  # three blocks; once up to q, k, v and once up to o


def test_a_transform_before_o_proj_is_applied_once_when_attention_is_replayed():
    model = tiny_model("llama")
    run = BlockRun(model.model.layers[0], batches_of(model, *tokens([0] * 6)), 0)
    o_proj = run.linear("self_attn.o_proj")
    o_proj.register_forward_pre_hook(lambda _module, args: (3 * args[0],))
    run.hessian(("self_attn.o_proj",))
    run.replace("self_attn.o_proj", rtn(o_proj.weight, SCHEME), SCHEME)
    expected_BTH = BlockRun(run.block, run.batches, 0).forward(1)
    torch.testing.assert_close(run.forward(1), expected_BTH, rtol=0, atol=1e-6)


def test_gptq_beats_rtn_on_the_model_outputs():
    model = tiny_model("qwen3")
    input_ids_NT, mask_NT = tokens([0] * 6)
    reference = model(input_ids=input_ids_NT).logits
    errors = {}
    for name in ("rtn", "gptq"):
        stream, method = MemoryStream(model), METHODS[name].block_method(METHODS[name].options())
        batches = batches_of(model, input_ids_NT, mask_NT) if method.needs_calibration else []
        quantize_blocks(stream, batches, method, SCHEME)
        quantized = copy.deepcopy(model)
        quantized.model.layers = nn.ModuleList(stream.stored)
        errors[name] = float((quantized(input_ids=input_ids_NT).logits - reference).square().mean())
    assert errors["gptq"] < errors["rtn"]


def test_unknown_method_and_unknown_layer():
    with pytest.raises(ValueError, match=r"did you mean 'gptq'.*valid methods: rtn, gptq, awq"):
        initializer("gptqq")
    model = tiny_model("llama")
    model.model.layers[0].mlp.extra = nn.Linear(64, 64)
    with pytest.raises(ValueError, match=r"mlp\.extra"):
        quantize_blocks(MemoryStream(model), [], initializer("rtn").block_method(RTNOptions()), SCHEME)


def test_a_failing_hessian_names_block_and_linears():
    model = tiny_model("llama")
    batches = batches_of(model, *tokens([0] * 6))
    batches[0].hidden_BTH[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"block 0, self_attn\.k_proj.*not finite"):
        quantize_blocks(MemoryStream(model), batches, initializer("gptq").block_method(GPTQOptions()), SCHEME)
