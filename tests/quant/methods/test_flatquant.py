"""FlatQuant's calibration on random decoder layers: what it starts from, that it helps, how it fails and goes on."""

import copy
import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from quant.calibration.activations import Keep, in_memory, on_disk
from quant.calibration.streaming import Batch, BlockRun, LinearResult, quantize_blocks
from quant.decoder import INPUT_SITES
from quant.grids.scheme import Scheme
from quant.methods.flatquant import flatquant_blocks, initial_sites, learnable
from quant.methods.flatquant_training import float_copy, observe
from quant.methods.options import FlatQuantOptions
from quant.student.linear import prepare, quantized_linears
from quant.student.sites import (
    DOWN_SCALE,
    VALUE_TRANSFORM,
    InputQuantizer,
    KVQuantizer,
    LayerSites,
    attach,
    quantizers,
)

W4A4KV4 = Scheme.parse("W4A4KV4")
OPTIONS = FlatQuantOptions(epochs=4)
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
ARCHITECTURES: dict[str, Any] = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
}
OUTLIERS = (3, 17, 40)


def tiny_model(architecture: str) -> Any:
    """Random, with large and small channels as trained models have them."""
    torch.manual_seed(0)
    model = ARCHITECTURES[architecture]()
    for name, parameter in model.named_parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
        if name.endswith("layernorm.weight"):
            parameter.data[list(OUTLIERS)] *= 20
    return model.eval().requires_grad_(False)


class MemoryStream:
    """The decoder layers of a model with their sites switched off; counts the loaded ones that are still alive."""

    def __init__(self, model: Any, scheme: Scheme = W4A4KV4) -> None:
        self.blocks, self.num_blocks, self.scheme = list(model.model.layers), len(model.model.layers), scheme
        self.stored: list[nn.Module] = []
        self.results: list[dict[str, LinearResult]] = []
        self.further: list[dict[str, Tensor]] = []
        self.alive: list[Any] = []
        self.most_alive = 0

    def num_stored(self) -> int:
        return len(self.stored)

    def load(self, index: int) -> nn.Module:
        block = copy.deepcopy(self.blocks[index])
        kv = KVQuantizer(self.scheme.kv_bits) if self.scheme.kv_bits else None
        attach(block, LayerSites({site: InputQuantizer(self.scheme.activation_bits) for site in INPUT_SITES}, kv))
        switch(block, on=False)
        gc.collect()
        self.alive = [ref for ref in self.alive if ref() is not None] + [weakref.ref(block)]
        self.most_alive = max(self.most_alive, len(self.alive))
        return block

    def load_stored(self, index: int) -> nn.Module:
        raise AssertionError("FlatQuant calibrates on the full-precision model")

    def store(self, index: int, block: nn.Module, results: Any, further: Any) -> None:
        self.stored.append(copy.deepcopy(block))
        self.results.append(dict(results))
        self.further.append(dict(further))


def switch(block: nn.Module, *, on: bool) -> nn.Module:
    for _, quantizer in quantizers(block):
        quantizer.enabled = on
    return block


def batches_of(model: Any, *, num_padding: int = 0, keep: Keep = in_memory) -> list[Batch]:
    """Three batches of two sequences of 24 tokens, the last `num_padding` of each one's first being padding."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(3):
        input_ids_BT = torch.randint(0, 50, (2, 24), generator=generator)
        hidden_BTH = 10 * model.model.embed_tokens(input_ids_BT)
        position_ids = torch.arange(24)[None]
        inputs = {"position_embeddings": model.model.rotary_emb(hidden_BTH, position_ids)}
        mask_BT = torch.ones(2, 24, dtype=torch.bool)
        mask_BT[0, 24 - num_padding :] = False
        batches.append(Batch(keep(hidden_BTH), mask_BT if num_padding else None, [inputs] * 2, keep))
    return batches


def calibrated(model: Any, options: FlatQuantOptions = OPTIONS, **kwargs: Any) -> MemoryStream:
    stream = MemoryStream(model)
    quantize_blocks(stream, batches_of(model, **kwargs), flatquant_blocks(options), W4A4KV4)
    return stream


@torch.no_grad()
def block_error(block: nn.Module, batches: list[Batch], targets: list[Batch]) -> float:
    run = BlockRun(block, batches, 0)
    errors = [(run.forward(i) - target.hidden_BTH).square().mean() for i, target in enumerate(targets)]
    return float(sum(errors)) / len(errors)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_calibration_lowers_the_error_of_the_block_that_is_stored(architecture: str) -> None:
    """Round-to-nearest > the initial transforms > what is stored, and the report tells that of the last."""
    model = tiny_model(architecture)
    stream = calibrated(model)
    batches = batches_of(model)
    run = BlockRun(stream.load(0), batches, 0)
    targets, max_inputs = observe(run)
    plain = LayerSites({site: InputQuantizer(4) for site in INPUT_SITES}, KVQuantizer(4))
    rtn = float_copy(run.block)
    prepare(nn.ModuleDict({"block": rtn}), W4A4KV4, None, "recomputed", {"block": plain})
    start = learnable(float_copy(run.block), W4A4KV4, initial_sites(run.block, W4A4KV4, max_inputs, OPTIONS.seed))
    errors = [block_error(block, batches, targets) for block in (rtn, start, switch(stream.stored[0], on=True))]
    assert errors[2] < errors[1] < 0.7 * errors[0]
    for results in stream.results:
        reports = [result.report for result in results.values()]
        assert len(reports) == 7 and all(report["retries"] == 0 and 0 < report["error"] < 0.1 for report in reports)
        assert all(report["last_loss"] < report["first_loss"] for report in reports)
        assert 1 < reports[0]["condition_number"] < 1e4
    # Rounding norms to the float32 that they were in changes nothing here, so this is what was calibrated.
    assert errors[2] == pytest.approx(stream.results[0]["mlp.up_proj"].report["last_loss"], rel=0.2)


def test_training_goes_on_from_the_models_own_weights_norms_and_biases() -> None:
    model = tiny_model("qwen2")
    stream = calibrated(model)
    for block, results, further, stored in zip(
        stream.blocks, stream.results, stream.further, stream.stored, strict=True
    ):
        for name, result in results.items():
            assert torch.equal(result.state.weight, block.get_parameter(f"{name}.weight"))
            assert result.state.clip is not None and result.state.clip.shape == (len(result.state.weight), 1, 2)
        changed = {"input_layernorm.weight", "post_attention_layernorm.weight"}
        changed |= {"self_attn.v_proj.bias"}  # up_proj has none, q and k stay
        for name in changed:
            assert torch.equal(further[name], block.get_parameter(name))
            assert not torch.equal(stored.get_parameter(name), block.get_parameter(name))
        assert torch.equal(stored.get_parameter("self_attn.q_proj.bias"), block.get_parameter("self_attn.q_proj.bias"))
        learned = {name for name in further if not name.endswith(("layernorm.weight", "bias"))}
        ends = {"left": 4, "right": 5, "diagonal": 3, "logits": 6}
        assert {end: sum(name.endswith(f".{end}") for name in learned) for end in ends} == ends
        assert len(learned) == sum(ends.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_students_weights_are_the_checkpoints_under_autocast_too(architecture: str) -> None:
    model = tiny_model(architecture)
    run = BlockRun(MemoryStream(model).load(0), batches_of(model), 0)
    block = learnable(run.block, W4A4KV4, initial_sites(run.block, W4A4KV4, observe(run)[1], OPTIONS.seed))
    for _, linear in quantized_linears(block):
        with torch.no_grad():
            of_checkpoint = linear.rounded_weight(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            of_student = linear.rounded_weight(torch.float32)
        assert of_student.requires_grad and torch.equal(of_student, of_checkpoint)


def test_initial_sites() -> None:
    """Orthogonal transforms that depend on the seed alone, and scales by the published formula in a scalar loop."""
    model = tiny_model("qwen3")
    run = BlockRun(MemoryStream(model).load(0), batches_of(model, num_padding=5), 0)
    _, max_inputs = observe(run)
    sites, again, other = (initial_sites(run.block, W4A4KV4, max_inputs, seed) for seed in (1, 1, 2))
    shapes = {}
    for site, quantizer in sites.inputs.items():
        transform = quantizer.transform
        assert transform is not None and again.inputs[site].transform is not None
        for part in ("left", "right"):
            matrix = getattr(transform, part)
            shapes[site, part] = None if matrix is None else len(matrix)
            if matrix is not None:
                torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix)), atol=1e-5, rtol=0)
                assert torch.equal(matrix, getattr(again.inputs[site].transform, part))
                assert not torch.equal(matrix, getattr(other.inputs[site].transform, part))
    assert list(shapes.values()) == [6, 8, 4, None, 6, 8, 8, 10]
    assert sites.kv is not None and sites.kv.key_transform is not None and sites.kv.key_transform.right is not None
    assert sites.kv.key_transform.right.shape == (16, 16)
    assert sites.between[VALUE_TRANSFORM].right is not None and sites.between[VALUE_TRANSFORM].right.shape == (16, 16)

    down = sites.between[DOWN_SCALE].diagonal
    scale = sites.inputs["mlp"].transform
    assert scale is not None and scale.diagonal is not None and down is not None
    up_gate = torch.cat([run.block.get_parameter(f"mlp.{name}_proj.weight") for name in ("up", "gate")])
    for diagonal_I, weight_OI, site in (
        (scale.diagonal, up_gate, "mlp"),
        (down, run.block.get_parameter("mlp.down_proj.weight"), "mlp.down_proj"),
    ):
        for i in range(0, len(diagonal_I), 7):
            largest = max(abs(float(w)) for w in weight_OI[:, i])
            expected = largest**0.7 / float(max_inputs[site][i]) ** 0.3
            assert diagonal_I[i].item() == pytest.approx(expected, rel=1e-5)


def test_padding_counts_neither_for_the_targets_nor_for_the_scales() -> None:
    """The same results whatever the padded positions hold."""
    model, streams = tiny_model("llama"), []
    for value in (0.0, 100.0):
        batches = batches_of(model, num_padding=5)
        for batch in batches:
            batch.hidden_BTH[0, -5:] = value
        stream = MemoryStream(model)
        quantize_blocks(stream, batches, flatquant_blocks(FlatQuantOptions(epochs=1)), W4A4KV4)
        streams.append(stream)
    for one, other in zip(streams[0].further, streams[1].further, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_one_block_in_memory_and_a_resumed_run_has_the_same_results(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Activations on disk give the same bits, too."""
    model = tiny_model("qwen3")
    whole = calibrated(model)
    assert whole.most_alive == 1
    resumed = MemoryStream(model)
    resumed.stored, resumed.results, resumed.further = whole.stored[:1], whole.results[:1], whole.further[:1]
    seen: list[tuple[float, int]] = []
    quantize_blocks(
        resumed,
        batches_of(model, keep=on_disk(tmp_path)),
        flatquant_blocks(OPTIONS),
        W4A4KV4,
        lambda done, total, info: seen.append((done, total)),
    )
    assert seen == [(1, 2), (1.25, 2), (1.5, 2), (1.75, 2), (2, 2), (2, 2)], "progress within a block, too"
    assert not list(tmp_path.iterdir()), "files without a name leave nothing behind"
    for one, other in zip(whole.further, resumed.further, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert whole.results[1]["mlp.up_proj"].report == resumed.results[1]["mlp.up_proj"].report


def test_an_ill_conditioned_block_starts_anew_at_a_lower_rate() -> None:
    model = tiny_model("qwen3")
    options = FlatQuantOptions(epochs=2, learning_rate=0.05)
    first = calibrated(model, options).results[0]["mlp.up_proj"].report
    slower = FlatQuantOptions(epochs=2, learning_rate=0.05 / 3)
    second = calibrated(model, slower).results[0]["mlp.up_proj"].report
    assert first["condition_number"] > 1.5 * second["condition_number"]
    limit = math.sqrt(first["condition_number"] * second["condition_number"])
    limited = FlatQuantOptions(epochs=2, learning_rate=0.05, max_condition_number=limit)
    stream = MemoryStream(model)
    stream.num_blocks = 1
    quantize_blocks(stream, batches_of(model), flatquant_blocks(limited), W4A4KV4)
    report = stream.results[0]["mlp.up_proj"].report
    assert (report["retries"], report["learning_rate"]) == (1, pytest.approx(0.05 / 3))
    assert report["last_loss"] == second["last_loss"], "from the initial transforms, not from where it went wrong"


def beyond_bounds(**fields: float) -> FlatQuantOptions:
    """Options that a configuration would refuse."""
    options = FlatQuantOptions(epochs=1, max_retries=0)
    for name, value in fields.items():
        object.__setattr__(options, name, value)
    return options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            FlatQuantOptions(epochs=1, max_condition_number=1.0001, max_retries=2),
            r"block 0: calibration is unstable: at learning rate 0\.005 a condition number reached .* in epoch 1; at "
            r"learning rate 0\.0017 .*; at learning rate 0\.00056 .*Lower flatquant\.learning_rate",
        ),
        (beyond_bounds(learning_rate=1e30), "the loss became|infinite or NaN|inv|cond"),
    ],
)
def test_when_the_retries_are_used_up_the_error_says_what_to_change(options: FlatQuantOptions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrated(tiny_model("qwen3"), options)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"W4 does not quantize them.*W4A4KV4"):
        OPTIONS.check(Scheme.parse("W4"))
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"block 0: there are no calibration sequences"):
        quantize_blocks(MemoryStream(model), [], flatquant_blocks(OPTIONS), W4A4KV4)
    batches = batches_of(model)
    batches[0].hidden_BTH[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"block 0: the calibration inputs are not finite"):
        quantize_blocks(MemoryStream(model), batches, flatquant_blocks(OPTIONS), W4A4KV4)
    for values in ({"epochs": 0}, {"learning_rate": 0}, {"max_condition_number": 1}, {"max_retries": -1}):
        with pytest.raises(ValueError, match="usual is"):
            FlatQuantOptions(**values)


def test_without_a_quantized_cache_there_is_no_key_transform() -> None:
    scheme, model = Scheme.parse("W4A4"), tiny_model("llama")
    stream = MemoryStream(model, scheme)
    quantize_blocks(stream, batches_of(model), flatquant_blocks(FlatQuantOptions(epochs=1)), scheme)
    assert not any("kv_quantizer" in name for name in stream.further[0])
    assert "self_attn.value_transform.right" in stream.further[0]
