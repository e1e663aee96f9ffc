"""QuaRot against dense matrices in float64, and on whole tiny models.

Dimensions: B sequences, H key/value heads, T tokens, D head size.
"""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from quant.decoder import DecoderShape
from quant.grids.scheme import Scheme
from quant.methods.options import GPTQOptions, QuaRotOptions
from quant.methods.quarot import Rotation, quarot_blocks, random_signs
from quant.student.site_tensors import build_sites
from quant.student.sites import Clip, KVQuantizer, attach, decoder_layers, quantizers_disabled
from quant.transforms.hadamard import hadamard_matrix
from quant.transforms.kronecker import KroneckerTransform

SCHEME = Scheme.parse("W4A4KV4")
# Sizes whose Hadamard matrices have an odd part: 96 = 12 x 8, 152 = 76 x 2, 24 = 12 x 2.
SIZES = {"vocab_size": 50, "hidden_size": 96, "intermediate_size": 152, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "qwen2": lambda: Qwen2Config(**SIZES, **HEADS),
    "qwen3": lambda: Qwen3Config(**SIZES, **HEADS, head_dim=32, tie_word_embeddings=True),
    "llama": lambda: LlamaConfig(**SIZES, **HEADS),
    "llama with biases": lambda: LlamaConfig(**SIZES, **HEADS, attention_bias=True, mlp_bias=True),
    "llama with six heads": lambda: LlamaConfig(**SIZES, num_attention_heads=6, num_key_value_heads=2),
}
architectures = pytest.mark.parametrize("architecture", CONFIGS)
INPUT_IDS = torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(1))


class ExactNorm(nn.Module):
    """An RMSNorm in the dtype of its input; that of transformers computes in float32 whatever it is given."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


def exact(model: nn.Module) -> nn.Module:
    """A copy of the model that computes in float64 throughout."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if hasattr(module, "variance_epsilon"):
            model.set_submodule(name, ExactNorm(module))
    return model.double()


def tiny_model(architecture: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture]())
    for name, parameter in model.named_parameters():  # biases and norms too, so that leaving one out shows
        parameter.data.add_(0.1 * torch.randn_like(parameter))
        if "norm" in name and parameter.numel() == SIZES["hidden_size"]:  # outlier channels, what QuaRot is for
            parameter.data[::17] *= 15
    return model.to(dtype).eval().requires_grad_(False)


def rotated(model: nn.Module, scheme: Scheme = SCHEME, **options: object) -> nn.Module:
    """The whole model rewritten in memory, behind its online quantizers."""
    model = copy.deepcopy(model)
    rotation = Rotation(DecoderShape.from_config(model.config.to_dict()), scheme, QuaRotOptions(**options))
    for name, layer in decoder_layers(model).items():
        tensors, sites = rotation.block(layer.state_dict())
        layer.load_state_dict(tensors)
        named = {f"{name}.{leaf}": tensor for leaf, tensor in sites.items()}
        attach(layer, build_sites(named, scheme, [name], learned=False)[name])
    head_VH, norm_H = rotation.head(model.lm_head.weight, model.model.norm.weight)
    model.model.embed_tokens.weight = nn.Parameter(rotation.embedding(model.model.embed_tokens.weight))
    model.lm_head.weight, model.model.norm.weight = nn.Parameter(head_VH), nn.Parameter(norm_H)
    return model.requires_grad_(False)


def dense_rotation(size: int, seed: int = 0) -> Tensor:
    return torch.diag(random_signs(size, seed)) @ hadamard_matrix(size)


@architectures
@pytest.mark.parametrize("scheme", ["W4A4KV4", "W4A4", "W3G8"])
def test_the_rotated_model_is_the_original_in_float64(architecture: str, scheme: str) -> None:
    model = exact(tiny_model(architecture))
    turned = rotated(model, Scheme.parse(scheme))
    expected = model(input_ids=INPUT_IDS, output_hidden_states=True)
    with quantizers_disabled(turned):
        found = turned(input_ids=INPUT_IDS, output_hidden_states=True)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-9, atol=1e-9)
    # and not because nothing was rotated: the residual stream is another one
    for before, after in zip(expected.hidden_states[:-1], found.hidden_states[:-1], strict=True):
        torch.testing.assert_close(after, before @ dense_rotation(96), rtol=1e-9, atol=1e-9)
        assert not torch.allclose(after, before, atol=0.1)


@architectures
def test_the_rotated_model_is_the_original_to_the_noise_of_bfloat16(architecture: str) -> None:
    model = tiny_model(architecture, torch.bfloat16)
    truth, turned = exact(model)(input_ids=INPUT_IDS).logits, rotated(model)
    with quantizers_disabled(turned):
        found = turned(input_ids=INPUT_IDS).logits
    noise, own_noise = (float((x - truth).square().mean()) for x in (found, model(input_ids=INPUT_IDS).logits))
    assert 0 < noise < 4 * own_noise  # weights and activations are rounded to bf16 once more


def test_weights_are_those_of_the_dense_matrices() -> None:
    model = tiny_model("qwen2").double()
    turned, before = rotated(model, seed=5), model.model.layers[1]
    after, q = turned.model.layers[1], dense_rotation(96, seed=5)
    heads, head = hadamard_matrix(4), hadamard_matrix(24)
    values = torch.kron(torch.eye(2, dtype=torch.float64), head)
    for part, norm in (("self_attn.{}_proj", "input_layernorm"), ("mlp.{}_proj", "post_attention_layernorm")):
        for name in ("q", "k", "v") if "attn" in part else ("up", "gate"):
            linear = part.format(name)
            gain = before.get_submodule(norm).weight
            expected = before.get_submodule(linear).weight @ torch.diag(gain) @ q
            expected = values.T @ expected if name == "v" else expected
            torch.testing.assert_close(after.get_submodule(linear).weight, expected, rtol=0, atol=1e-12)
    attention, attention_after = before.self_attn, after.self_attn
    torch.testing.assert_close(attention_after.v_proj.bias, attention.v_proj.bias @ values, rtol=0, atol=1e-12)
    torch.testing.assert_close(attention_after.q_proj.bias, attention.q_proj.bias, rtol=0, atol=0)
    # Behind online matrices with other entries than an orthonormal one's the weights hold the constant's inverse.
    for linear, rotation in (("self_attn.o_proj", torch.kron(heads, head)), ("mlp.down_proj", hadamard_matrix(152))):
        found, expected = after.get_submodule(linear).weight, q.T @ before.get_submodule(linear).weight @ rotation
        constant = (found * expected).sum() / expected.square().sum()
        assert 0.5 < constant < 2
        torch.testing.assert_close(found, constant * expected, rtol=0, atol=1e-12)
    for norm in (after.input_layernorm, after.post_attention_layernorm, turned.model.norm):
        assert torch.equal(norm.weight, torch.ones(96, dtype=torch.float64))
    head_VH = model.lm_head.weight @ torch.diag(model.model.norm.weight) @ q
    torch.testing.assert_close(turned.lm_head.weight, head_VH, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        turned.model.embed_tokens.weight, model.model.embed_tokens.weight @ q, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(("linear", "rotation"), [("self_attn.o_proj", (4, 32)), ("mlp.down_proj", (152,))])
def test_linears_behind_online_rotations_see_the_whole_hadamard_matrix(linear: str, rotation: tuple[int, ...]) -> None:
    """o_proj sees the heads mixed and each head rotated, although only the mixing is online."""
    model = exact(tiny_model("qwen3"))
    turned, seen = rotated(model), {}
    for label, one in (("plain", model), ("rotated", turned)):
        module = one.model.layers[0].get_submodule(linear)
        module.register_forward_hook(lambda _m, args, _out, label=label: seen.update({label: args[0]}))
        with quantizers_disabled(one):
            one(input_ids=INPUT_IDS)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for size in rotation:
        matrix = torch.kron(matrix, hadamard_matrix(size))
    expected = seen["plain"] @ matrix
    constant = (seen["rotated"] * expected).sum() / expected.square().sum()
    torch.testing.assert_close(seen["rotated"], constant * expected, rtol=1e-9, atol=1e-9)


def test_online_matrices_are_the_same_in_every_dtype() -> None:
    _, sites = Rotation(DecoderShape(96, 152, 12, 24), SCHEME, QuaRotOptions()).block(
        tiny_model("llama").model.layers[0].state_dict()
    )
    matrices = {name: tensor for name, tensor in sites.items() if "transform" in name}
    assert {name.rpartition(".transform.")[0] or name for name in matrices} == {
        "self_attn.o_proj.input_quantizer",
        "mlp.down_proj.input_quantizer",
        "self_attn.kv_quantizer.key_transform.right",
    }
    for matrix in matrices.values():
        mantissa, _ = torch.frexp(matrix.abs())
        assert torch.equal(mantissa, torch.full_like(matrix, 0.5))


def test_heads_stay_apart_where_no_hadamard_matrix_mixes_them() -> None:
    tensors = tiny_model("llama with six heads").model.layers[0].state_dict()
    new, sites = Rotation(DecoderShape(96, 152, 6, 16), SCHEME, QuaRotOptions()).block(tensors)
    assert not [name for name in sites if "o_proj.input_quantizer.transform" in name]
    head_wise = torch.kron(torch.eye(6, dtype=torch.float64), hadamard_matrix(16))
    expected = dense_rotation(96).T @ tensors["self_attn.o_proj.weight"].double() @ head_wise
    torch.testing.assert_close(new["self_attn.o_proj.weight"].double(), expected, rtol=0, atol=1e-6)


def scalar_quantization(row: list[float], bits: int, factor: float) -> list[float]:
    low, high = factor * min(0.0, *row), factor * max(0.0, *row)
    scale = (high - low) / (2**bits - 1)
    zero = round(-low / scale)
    return [(min(max(round(x / scale) + zero, 0), 2**bits - 1) - zero) * scale for x in row]


@pytest.mark.parametrize("factor", [0.95, 1.0])
def test_keys_and_values_are_those_of_a_scalar_loop(factor: float) -> None:
    key_BHTD, value_BHTD = torch.randn(2, 2, 2, 5, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    clip = None if factor == 1.0 else Clip.constant(factor)
    quantizer = KVQuantizer(4, KroneckerTransform(right_BB=hadamard_matrix(24)), clip, clip)
    found_key, found_value = quantizer(key_BHTD, value_BHTD)
    factor = 1.0 if clip is None else float(clip()[0])
    matrix = hadamard_matrix(24).tolist()
    for b in range(2):
        for h in range(2):
            for t in range(5):
                key, value = key_BHTD[b, h, t].tolist(), value_BHTD[b, h, t].tolist()
                turned = [sum(key[i] * matrix[i][j] for i in range(24)) for j in range(24)]
                turned = scalar_quantization(turned, 4, factor)
                back = [sum(turned[j] * matrix[i][j] for j in range(24)) for i in range(24)]
                torch.testing.assert_close(found_key[b, h, t].tolist(), back, rtol=1e-6, atol=1e-6)
                expected = scalar_quantization(value, 4, factor)
                torch.testing.assert_close(found_value[b, h, t].tolist(), expected, rtol=1e-6, atol=1e-6)


@architectures
def test_rotation_makes_activations_quantize_better(architecture: str) -> None:
    """Activations and cache at 4 bits, weights as they are; the same clips with and without rotations."""
    model, plain = tiny_model(architecture), tiny_model(architecture)
    clips = {"activation_clip": 1, "kv_clip": 1}
    for name, layer in decoder_layers(plain).items():
        attach(layer, build_sites({}, SCHEME, [name], learned=False)[name])
    errors = [
        float((one(input_ids=INPUT_IDS).logits - model(input_ids=INPUT_IDS).logits).square().mean())
        for one in (rotated(model, **clips), plain)
    ]
    assert errors[0] < 0.7 * errors[1]


def test_the_seed_makes_the_signs_and_no_other_state_does() -> None:
    shape = DecoderShape(96, 152, 4, 24)
    embedding_VH = torch.randn(10, 96)
    first, again, other = (Rotation(shape, SCHEME, QuaRotOptions(seed=s)).embedding(embedding_VH) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert set(random_signs(1000, 0).tolist()) == {-1.0, 1.0} and abs(random_signs(1000, 0).mean()) < 0.1


def test_clips_only_where_something_is_quantized() -> None:
    tensors = tiny_model("llama").model.layers[0].state_dict()
    names = {
        (scheme, clip): {
            name
            for name in Rotation(
                DecoderShape(96, 152, 4, 24), Scheme.parse(scheme), QuaRotOptions(activation_clip=clip, kv_clip=clip)
            ).block(tensors)[1]
            if name.endswith("logits")
        }
        for scheme in ("W4A4KV4", "W4A4", "W3G8")
        for clip in (0.9, 1)
    }
    assert len(names["W4A4KV4", 0.9]) == 6 and len(names["W4A4", 0.9]) == 4
    assert not any(names[key] for key in names if key[1] == 1 or key[0] == "W3G8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "awq"}, "must be 'gptq' or 'rtn'"),
        ({"weights": "rtn", "gptq": GPTQOptions()}, "set it to null"),
        ({"activation_clip": 0.0}, "activation_clip must lie above 0"),
        ({"kv_clip": 1.5}, "kv_clip must lie above 0"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuaRotOptions(**options)


def test_sizes_without_hadamard_matrix_are_refused_before_anything_is_read() -> None:
    rewrite = quarot_blocks(QuaRotOptions()).rewrite
    assert rewrite is not None
    with pytest.raises(ValueError, match="no Hadamard matrix of order 1022"):
        rewrite(DecoderShape(96, 1022, 4, 24), SCHEME)
