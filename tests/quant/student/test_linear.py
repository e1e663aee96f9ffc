"""prepare, convert and materialized on tiny random models of the supported architectures."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from quant.grids.affine import rtn
from quant.grids.scheme import ScaleMode, Scheme
from quant.student.linear import (
    LinearState,
    QuantLinear,
    check_group_size,
    linear_states,
    materialized,
    prepare,
    quantized_linears,
)
from tests.quant.plain import convert

ARCHITECTURES: dict[str, Any] = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
W3G32 = Scheme.parse("W3G32")
W3G32_ASYMMETRIC = Scheme.parse("W3G32", symmetric=False)
modes = pytest.mark.parametrize("mode", ["frozen", "recomputed", "learned"])


def tiny_model(name: str = "qwen3", tied: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    config_class, model_class = ARCHITECTURES[name]
    config = config_class(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = model_class(config).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    input_ids = torch.arange(24).view(2, 12) % 50
    return model(input_ids=input_ids).logits


def nudge(model: nn.Module) -> None:
    """Moves latent weights off the state that prepare gave them, as training does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, module in quantized_linears(model):
            module.weight.add_(0.01 * torch.randn(module.weight.shape, generator=generator))
            if isinstance(module.scale, nn.Parameter):
                module.scale.mul_(1.013)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_prepare_takes_every_linear_but_the_head(name: str, tied: bool) -> None:
    model = tiny_model(name, tied)
    head, embedding = model.lm_head, model.model.embed_tokens
    assert prepare(model, W3G32, None, "frozen") is model
    names = [name for name, _ in quantized_linears(model)]
    per_layer = ["self_attn." + p for p in ("q_proj", "k_proj", "v_proj", "o_proj")]
    per_layer += ["mlp." + p for p in ("gate_proj", "up_proj", "down_proj")]
    assert names == [f"model.layers.{layer}.{part}" for layer in range(2) for part in per_layer]
    assert model.lm_head is head and model.model.embed_tokens is embedding
    assert (head.weight is embedding.weight) == tied


def test_output_embeddings_of_another_name_are_kept() -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.unembed = nn.Linear(32, 32), nn.Linear(32, 50)

        def get_output_embeddings(self) -> nn.Module:
            return self.unembed

    model = prepare(Renamed(), W3G32, None, "frozen")
    assert [name for name, _ in quantized_linears(model)] == ["body"]


@modes
@pytest.mark.parametrize("scheme", [W3G32, W3G32_ASYMMETRIC], ids=str)
@pytest.mark.parametrize(
    ("name", "dtype"), [("qwen2", torch.bfloat16), ("qwen3", torch.float32), ("llama", torch.float32)]
)
@torch.no_grad()
def test_convert_keeps_the_outputs_bit_for_bit(name: str, dtype: torch.dtype, scheme: Scheme, mode: ScaleMode) -> None:
    plain = tiny_model(name, dtype=dtype)
    model = prepare(copy.deepcopy(plain), scheme, None, mode)
    nudge(model)
    student = logits(model)
    assert student.dtype == dtype and not torch.equal(student, logits(plain))
    assert convert(model) is model
    torch.testing.assert_close(logits(model), student, atol=0, rtol=0)
    assert not list(quantized_linears(model))
    dtypes = {key: value.dtype for key, value in model.state_dict().items()}
    assert dtypes == dict.fromkeys(plain.state_dict(), dtype)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, weight.to(torch.bfloat16).to(dtype))
    assert max(len(row.unique()) for row in weight.view(96, 2, 32).flatten(0, 1)) <= 2**scheme.bits


@torch.no_grad()
def test_convert_keeps_the_outputs_under_autocast() -> None:
    model = prepare(tiny_model("qwen2"), W3G32, None, "frozen")
    with torch.autocast("cpu", torch.bfloat16):
        student = logits(model)
        with materialized(model):
            torch.testing.assert_close(logits(model), student, atol=0, rtol=0)
            assert model.model.layers[0].mlp.up_proj.materialized_weight.dtype == torch.bfloat16
        torch.testing.assert_close(logits(convert(model)), student, atol=0, rtol=0)


def test_biases_stay_the_same_parameters() -> None:
    model = tiny_model("qwen2")
    bias = model.model.layers[0].self_attn.q_proj.bias
    prepare(model, W3G32, None, "frozen")
    logits(model).sum().backward()
    assert model.model.layers[0].self_attn.q_proj.bias is bias and bias.grad.any()
    assert convert(model).model.layers[0].self_attn.q_proj.bias is bias


def test_scale_modes_differ_in_whether_the_grid_follows_the_weights() -> None:
    cases: list[tuple[ScaleMode, Scheme, bool, set[str]]] = [
        ("frozen", W3G32_ASYMMETRIC, False, {"weight"}),
        ("recomputed", W3G32_ASYMMETRIC, True, {"weight"}),
        ("learned", W3G32_ASYMMETRIC, False, {"weight", "scale", "zero"}),
        ("learned", W3G32, False, {"weight", "scale"}),
    ]
    for mode, scheme, follows, trained in cases:
        linear = nn.Linear(64, 8, bias=False)
        module = QuantLinear(linear, rtn(linear.weight, scheme), scheme, mode)
        before, _ = module.grid()
        with torch.no_grad():
            module.weight.mul_(2)
        after, _ = module.grid()
        assert torch.equal(after, 2 * before if follows else before)
        module(torch.ones(1, 64)).square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
        assert {name for name, gradient in gradients.items() if gradient is not None and gradient.any()} == trained


@modes
@torch.no_grad()
def test_linear_states_rebuild_the_student(mode: ScaleMode) -> None:
    plain = tiny_model()
    model = prepare(copy.deepcopy(plain), W3G32_ASYMMETRIC, None, mode)
    nudge(model)
    states = linear_states(model)
    assert list(states) == [name for name, _ in quantized_linears(model)]
    assert {state.scale.dtype for state in states.values()} == {torch.bfloat16}
    rebuilt = prepare(copy.deepcopy(plain), W3G32_ASYMMETRIC, states, "frozen")
    torch.testing.assert_close(logits(rebuilt), logits(model), atol=0, rtol=0)
    nudge(rebuilt)
    for name, module in quantized_linears(model):
        assert torch.equal(states[name].weight, module.weight)  # training never writes into the caller's state


@modes
@torch.no_grad()
def test_materialized_gives_the_same_logits_and_rounds_once(mode: ScaleMode, monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepare(tiny_model(), W3G32, None, mode)
    calls: list[QuantLinear] = []
    rounded_weight = QuantLinear.rounded_weight

    def counted(module: QuantLinear, dtype: torch.dtype) -> Tensor:
        calls.append(module)
        return rounded_weight(module, dtype)

    monkeypatch.setattr(QuantLinear, "rounded_weight", counted)
    student, keys = logits(model), set(model.state_dict())
    calls.clear()
    with materialized(model):
        for _ in range(3):
            torch.testing.assert_close(logits(model), student, atol=0, rtol=0)
        assert set(model.state_dict()) == keys
    assert len(calls) == 14
    logits(model)
    assert len(calls) == 28


def test_materialized_ends_cleanly_after_an_exception() -> None:
    model = prepare(tiny_model(), W3G32, None, "recomputed")
    student = logits(model)
    with pytest.raises(RuntimeError, match="stop"), materialized(model):
        assert not logits(model).requires_grad
        with materialized(model):
            pass
        inside = [module.materialized_weight for _, module in quantized_linears(model)]
        assert all(weight is not None for weight in inside)  # the inner context gave back the outer one's weights
        nudge(model)
        torch.testing.assert_close(logits(model), student, atol=0, rtol=0)
        raise RuntimeError("stop")
    assert all(module.materialized_weight is None for _, module in quantized_linears(model))
    moved = logits(model)
    assert moved.requires_grad and not torch.equal(moved, student)


def test_training_reaches_every_latent_weight() -> None:
    model = prepare(tiny_model("llama"), W3G32, None, "frozen")
    logits(model).logsumexp(-1).sum().backward()
    gradients = [module.weight.grad for _, module in quantized_linears(model)]
    assert len(gradients) == 14 and all(gradient is not None and gradient.any() for gradient in gradients)


def test_a_group_size_that_does_not_fit_names_layers_and_remedies_before_any_change() -> None:
    model = tiny_model()
    before = dict(model.named_modules())
    with pytest.raises(ValueError) as error:
        prepare(model, Scheme.parse("W3G64"), None, "frozen")
    message = str(error.value)
    assert "64 does not divide 96 input features in model.layers.0.mlp.down_proj, model.layers.1.mlp" in message
    assert "Group sizes that work for all layers: 32, -1" in message
    assert dict(model.named_modules()) == before


def test_prepare_works_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = ARCHITECTURES["qwen3"][1](tiny_model().config)
    with pytest.raises(ValueError, match="work for all layers"):
        check_group_size(model, Scheme.parse("W3G128"))
    prepare(model, W3G32, None, "learned")
    module = model.get_submodule("model.layers.0.mlp.down_proj")
    assert module.weight.is_meta and module.scale.shape == (64, 3)


def _drop(states: dict[str, LinearState]) -> None:
    del states["model.layers.1.mlp.down_proj"]


def _add(states: dict[str, LinearState]) -> None:
    states["model.layers.9.mlp.down_proj"] = states["model.layers.1.mlp.down_proj"]


def _reshape(states: dict[str, LinearState]) -> None:
    state = states["model.layers.0.mlp.up_proj"]
    states["model.layers.0.mlp.up_proj"] = dataclasses.replace(state, scale=state.scale[:, :1])


def _unround(states: dict[str, LinearState]) -> None:
    state = states["model.layers.0.mlp.up_proj"]
    states["model.layers.0.mlp.up_proj"] = dataclasses.replace(state, scale=state.scale * 1.0001)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop, "no quantization state for model.layers.1.mlp.down_proj"),
        (_add, "layers that the model lacks: model.layers.9.mlp.down_proj"),
        (_reshape, r"model.layers.0.mlp.up_proj: .* W3G32 needs \(96, 64\), \(96, 2\) and \(96, 2\)"),
        (_unround, "up_proj: the grid is not one of W3G32 .* round before use"),
    ],
)
def test_states_that_do_not_fit_are_refused_before_any_change(
    damage: Callable[[dict[str, LinearState]], None], message: str
) -> None:
    model = tiny_model()
    states = {
        name: rtn(module.weight, W3G32)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    damage(states)
    with pytest.raises(ValueError, match=message):
        prepare(model, W3G32, states, "frozen")
    assert not list(quantized_linears(model))


def test_other_misuse_is_refused_with_the_remedy() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="frozen, recomputed, learned"):
        prepare(model, W3G32, None, "dynamic")  # type: ignore[arg-type]
    prepare(model, W3G32, None, "frozen")
    with pytest.raises(ValueError, match="convert it first"):
        prepare(model, W3G32, None, "frozen")
    with pytest.raises(ValueError, match="must stay float32"):
        logits(model.to(torch.bfloat16))
