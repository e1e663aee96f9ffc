"""Learned transforms in whole models: they change nothing but the rounding, and their gradients are the formula's."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from quant.decoder import INPUT_SITES
from quant.grids.affine import LinearState, rtn
from quant.grids.scheme import Scheme
from quant.student.linear import QuantLinear, prepare
from quant.student.sites import (
    DOWN_SCALE,
    INPUT_QUANTIZER,
    VALUE_TRANSFORM,
    Clip,
    InputQuantizer,
    KVQuantizer,
    LayerSites,
    attach,
    learned_parameters,
    quantizers_disabled,
)
from quant.student.targets import target_linears
from quant.transforms.kronecker import KroneckerTransform, balanced_factors

W4A4KV4 = Scheme.parse("W4A4KV4")
HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM = 60, 84, 4, 10
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
}
ARCHITECTURES: dict[str, Any] = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
}
LINEARS = [linear for linears in INPUT_SITES.values() for linear in linears]
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiny_model(architecture: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    model = ARCHITECTURES[architecture]()
    for parameter in model.parameters():  # transformers starts biases at 0 and norms at 1, where mistakes do not show
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval().requires_grad_(False)


def make_sites(seed: int, spread: float = 0.3) -> LayerSites:
    """All that FlatQuant learns, in float64; with the default spread far from the identity and from orthogonal."""
    seeds = iter(range(100 * seed, 100 * seed + 100))

    def matrix(size: int) -> Tensor:
        return spread * random(size, size, seed=next(seeds)) + torch.eye(size, dtype=torch.float64)

    def scale(size: int) -> Tensor:
        return random(size, seed=next(seeds)).abs() + 0.3

    def kronecker(size: int, *, scaled: bool) -> KroneckerTransform:
        left, right = balanced_factors(size)
        return KroneckerTransform(matrix(left), matrix(right), scale(size) if scaled else None, learned=True)

    def clip() -> Clip:
        return Clip(1 + random(2, seed=next(seeds)).abs(), learned=True)

    transforms = {
        "self_attn": kronecker(HIDDEN, scaled=True),
        "self_attn.o_proj": KroneckerTransform(matrix(HEADS), learned=True),
        "mlp": kronecker(HIDDEN, scaled=True),
        "mlp.down_proj": kronecker(INTERMEDIATE, scaled=False),
    }
    between = {
        VALUE_TRANSFORM: KroneckerTransform(None, matrix(HEAD_DIM), learned=True),
        DOWN_SCALE: KroneckerTransform(None, None, scale(INTERMEDIATE), learned=True),
    }
    kv = KVQuantizer(4, KroneckerTransform(None, matrix(HEAD_DIM), learned=True), clip(), clip())
    return LayerSites({site: InputQuantizer(4, transforms[site], clip()) for site in INPUT_SITES}, kv, between)


def transformed(model: Any, spread: float = 0.3) -> tuple[Any, list[LayerSites]]:
    """The model in place with transforms and the weights that go with them, not rounded; differentiable in both."""
    all_sites = []
    for index, layer in enumerate(model.model.layers):
        sites = make_sites(index + 1, spread)
        for name in LINEARS:
            linear, basis = layer.get_submodule(name), sites.weight_basis(name)
            weight_OI, bias_O = linear.weight.double(), linear.bias
            del linear.weight, linear.bias
            linear.weight = basis.weight(weight_OI)
            linear.bias = None if bias_O is None else basis.bias(bias_O.double())
        attach(layer, sites)
        all_sites.append(sites)
    return model, all_sites


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=torch.arange(24).view(2, 12) % 50).logits


@architectures
def test_without_quantizers_nothing_changes_and_no_transform_has_a_gradient(architecture: str) -> None:
    """What a transform does to activations and to weights cancels, in the outputs and so in the gradients."""
    expected = logits(tiny_model(architecture))
    model, all_sites = transformed(tiny_model(architecture))
    with quantizers_disabled(model):
        found = logits(model)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    weights = random(*found.shape, seed=7)
    transforms, _ = learned_parameters(model)
    assert len(transforms) == 2 * (3 + 1 + 3 + 2 + 1 + 1 + 1)
    keys = {id(p) for sites in all_sites if sites.kv is not None for p in sites.kv.parameters()}
    used = [p for p in transforms if id(p) not in keys]
    for gradient in torch.autograd.grad((found * weights).sum(), used):
        assert gradient.abs().max() < 1e-8


@architectures
def test_without_quantizers_bfloat16_differs_by_its_noise(architecture: str) -> None:
    expected = logits(tiny_model(architecture))
    noise = (logits(tiny_model(architecture, torch.bfloat16)).double() - expected).abs().mean()
    model, _ = transformed(tiny_model(architecture), spread=0.05)
    for name, linear in target_linears(model).items():
        plain = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        plain.weight.data = linear.weight.detach()
        if plain.bias is not None:
            plain.bias.data = linear.bias.detach()
        quantizer = getattr(linear, INPUT_QUANTIZER, None)
        model.set_submodule(name, plain)
        if quantizer is not None:
            plain.register_forward_pre_hook(lambda _, args, q=quantizer: (q(args[0]),))
            quantizer.enabled = False
    with quantizers_disabled(model):
        found = logits(model.bfloat16()).double()
    assert 0 < (found - expected).abs().mean() < 3 * noise


def rounded(x: Tensor) -> Tensor:
    """Straight-through rounding."""
    return (x.round() - x).detach() + x


def through(x: Tensor, dtype: torch.dtype) -> Tensor:
    return (x.to(dtype).to(x.dtype) - x).detach() + x


def activation_formula(x: Tensor, logits_2: Tensor, bits: int = 4) -> Tensor:
    """FlatQuant's activation quantizer (flatquant/quant_utils.py, ActivationQuantizer) with plain autograd."""
    zero = torch.zeros((), dtype=x.dtype)
    low, high = (torch.minimum(x.amin(-1, keepdim=True), zero), torch.maximum(x.amax(-1, keepdim=True), zero))
    low, high = low * logits_2[0].sigmoid(), high * logits_2[1].sigmoid()
    scale = (high - low) / (2**bits - 1)
    offset = (-low / scale).round().detach()
    return scale * (torch.clamp(rounded(x / scale) + offset, 0, 2**bits - 1) - offset)


def weight_formula(w_OI: Tensor, logits_O12: Tensor) -> Tensor:
    """FlatQuant's symmetric weight quantizer with LWC (flatquant/flat_linear.py), scales and results in bf16."""
    low = w_OI.amin(-1, keepdim=True) * logits_O12[..., 0].sigmoid()
    high = w_OI.amax(-1, keepdim=True) * logits_O12[..., 1].sigmoid()
    w_OI = torch.maximum(torch.minimum(w_OI, high), low)
    scale = through(torch.maximum(-low, high) / 7, torch.bfloat16)
    return through(scale * torch.clamp(rounded(w_OI / scale), -8, 7), torch.bfloat16)


def dense(transform: KroneckerTransform, size: int) -> Tensor:
    """P [size, size] with autograd, in float32."""
    left, right, diagonal = transform.left, transform.right, transform.diagonal
    columns = size if left is None else size // left.shape[0]
    rows = size if right is None else size // right.shape[0]
    left = torch.eye(rows) if left is None else left.float()
    right = torch.eye(columns if transform.left is not None else 1) if right is None else right.float()
    matrix = torch.kron(left, right)
    return matrix if diagonal is None else torch.diag(diagonal.float()) @ matrix


def quantized_layer(architecture: str) -> tuple[nn.Module, LayerSites]:
    """A float32 decoder layer prepared with learned transforms and weight clips."""
    layer, sites = tiny_model(architecture, torch.float32).model.layers[0], make_sites(3)
    for module in (*sites.inputs.values(), sites.kv, *sites.between.values()):
        assert module is not None
        module.float()
    states = {}
    for index, name in enumerate(LINEARS):
        state = rtn(layer.get_submodule(name).weight, W4A4KV4)
        clip = 1 + random(*state.scale.shape, 2, seed=50 + index).abs().float()
        states[f"layer.{name}"] = LinearState(state.weight, state.scale, state.zero, clip)
    prepare(nn.ModuleDict({"layer": layer}), W4A4KV4, states, "recomputed", {"layer": sites})
    return layer, sites


@pytest.mark.parametrize("name", LINEARS)
def test_gradients_of_a_quantized_linear_are_those_of_the_published_formula(name: str) -> None:
    """Latent weights, every transform, scale and clip at once; biases where there are some."""
    layer, sites = quantized_layer("qwen2")
    site = next(site for site, linears in INPUT_SITES.items() if name in linears)
    linear, quantizer = layer.get_submodule(name), sites.inputs[site]
    assert isinstance(linear, QuantLinear) and linear.basis is not None and linear.weight_clip is not None
    linear.requires_grad_(True)
    x = random(2, 7, linear.in_features, seed=9).float().requires_grad_(True)
    out_gradient = random(2, 7, linear.out_features, seed=10).float()
    modules = [m for m in (quantizer, *linear.basis.inputs, linear.basis.output, linear) if m is not None]
    learned = [x, *dict.fromkeys(p for module in modules for p in module.parameters())]

    found = linear.forward(quantizer(x))  # .forward, since o_proj and down_proj have the quantizer as a hook
    found_gradients = torch.autograd.grad(found, learned, out_gradient)

    assert quantizer.transform is not None and quantizer.clip is not None
    weight_OI, bias_O = linear.weight, linear.bias
    for transform in linear.basis.inputs:
        inverse_II = torch.linalg.inv(dense(transform, linear.in_features).double()).float()
        weight_OI = weight_OI @ inverse_II.T
    if linear.basis.output is not None:
        repeats = linear.out_features // (HEAD_DIM if name.endswith("v_proj") else linear.out_features)
        block = dense(linear.basis.output, linear.out_features // repeats)
        output_OO = torch.block_diag(*[block] * repeats)
        weight_OI = output_OO.T @ weight_OI
        bias_O = None if bias_O is None else bias_O @ output_OO
    x_BTI = activation_formula(x @ dense(quantizer.transform, linear.in_features), quantizer.clip.logits)
    expected = x_BTI @ weight_formula(weight_OI, linear.weight_clip.logits).T
    expected = expected if bias_O is None else expected + bias_O
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    for gradient, expected_gradient in zip(
        found_gradients, torch.autograd.grad(expected, learned, out_gradient), strict=True
    ):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-4 * float(gradient.abs().max()), rtol=1e-3)


def test_gradients_of_keys_and_values_are_those_of_transformed_queries_and_keys() -> None:
    """(q P^-T) fq(k P)^T, as published, against q of the keys that the quantizer brings back."""
    kv = make_sites(4).kv
    assert kv is not None and kv.key_transform is not None and kv.key_clip is not None and kv.value_clip is not None
    assert kv.key_transform.right is not None
    query, key, value = (random(2, 3, 5, HEAD_DIM, seed=seed).requires_grad_(True) for seed in (1, 2, 3))
    learned = [query, key, value, *kv.parameters()]
    gradients = random(2, 3, 5, 5, seed=4), random(2, 3, 5, HEAD_DIM, seed=5)

    new_key, new_value = kv(key, value)
    found = query @ new_key.mT, new_value
    matrix = kv.key_transform.right
    transformed_query = query @ torch.linalg.inv(matrix).T
    expected = (
        transformed_query @ activation_formula(key @ matrix, kv.key_clip.logits).mT,
        activation_formula(value, kv.value_clip.logits),
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)
    found_gradients = torch.autograd.grad(found, learned, gradients)
    expected_gradients = torch.autograd.grad(expected, learned, gradients)
    for one, other in zip(found_gradients, expected_gradients, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_a_quantizer_takes_the_place_of_the_one_before() -> None:
    layer = tiny_model("qwen3", torch.float32).model.layers[0]
    attach(layer, LayerSites({site: InputQuantizer(2) for site in INPUT_SITES}, KVQuantizer(2)))
    attach(layer, LayerSites({site: InputQuantizer(8) for site in INPUT_SITES}, KVQuantizer(8)))
    once = tiny_model("qwen3", torch.float32).model.layers[0]
    attach(once, LayerSites({site: InputQuantizer(8) for site in INPUT_SITES}, KVQuantizer(8)))
    x_BTH = random(1, 6, HIDDEN, seed=1).float()
    angles = torch.arange(6)[:, None] * torch.ones(HEAD_DIM)
    inputs = {"position_embeddings": (angles.cos()[None], angles.sin()[None])}
    assert torch.equal(layer(x_BTH, **inputs), once(x_BTH, **inputs))


@pytest.mark.parametrize("name", LINEARS)
def test_rounding_the_weights_keeps_parameters_only(name: str) -> None:
    """Transformed weights kept for the backward pass would double the memory of the weights."""
    layer, kept = quantized_layer("qwen2")[0], []
    linear = layer.get_submodule(name)
    assert isinstance(linear, QuantLinear)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        assert linear.rounded_weight(torch.bfloat16).grad_fn is not None
    pointers = {parameter.data_ptr() for parameter in layer.parameters()}
    assert kept and {tensor.data_ptr() for tensor in kept} <= pointers


def test_learned_transforms_ask_for_weight_clips() -> None:
    model = nn.ModuleDict({"layer": tiny_model("qwen2", torch.float32).model.layers[0]})
    with pytest.raises(ValueError, match="come with learned clips"):
        prepare(model, W4A4KV4, None, "recomputed", {"layer": make_sites(3)})


@pytest.mark.parametrize("name", LINEARS)
def test_frozen_weights_change_no_other_gradient(name: str) -> None:
    """FlatQuant's calibration learns transforms and clips alone."""
    found = []
    for learns_weights in (True, False):
        linear = quantized_layer("qwen2")[0].get_submodule(name)
        assert isinstance(linear, QuantLinear) and linear.basis is not None and linear.weight_clip is not None
        linear.weight.requires_grad_(learns_weights)
        others = [p for module in (*linear.basis.transforms, linear.weight_clip) for p in module.parameters()]
        rounded_OI = linear.rounded_weight(torch.bfloat16)
        found.append(torch.autograd.grad(rounded_OI, others, random(*rounded_OI.shape, seed=11).bfloat16()))
    assert all(torch.equal(*pair) and pair[0].any() for pair in zip(*found, strict=True))
