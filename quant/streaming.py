"""Block-by-block PTQ: one decoder block in memory at a time, calibrated on the outputs of the quantized earlier ones.

Within a block the linears are taken in groups that share their inputs, {k, v, q}, o, {up, gate}, down, and the block
runs anew for each group, so that a group sees what the quantized ones before it give (true-sequential order:
ruikangliu/Quantized-Reasoning-Models, methods/gptq).

Peak memory is one block, the Hessian of one group, and per calibration token a hidden state and an attention output.
A killed run resumes after the last stored block: the hidden states are computed again through the stored quantized
blocks.  That costs one forward pass per stored block, a fraction of what quantizing it took, gives the same bits, and
spares every block the writing of the whole calibration set's activations, which are larger than the block.

Dimensions: B sequences of a batch, T tokens, H hidden size, I input features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quant.affine import LinearState, fake_quantize
from quant.scheme import Scheme
from quant.statistics import HessianAccumulator

LINEAR_GROUPS = (
    ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"),
    ("self_attn.o_proj",),
    ("mlp.up_proj", "mlp.gate_proj"),
    ("mlp.down_proj",),
)
"""The linears of a Qwen2, Qwen3 or Llama decoder layer in calibration order; those of one group have the same input."""
ATTENTION_END = ("self_attn.o_proj",)
"""The group whose inputs are kept while a block is worked on: attention is its most expensive part and would run three
times more.  They are about as large as the hidden states; the inputs of down_proj, three times that, are not kept."""


@dataclass
class Batch:
    """Calibration sequences between two blocks; `hidden_BTH` is replaced as they move on."""

    hidden_BTH: Tensor
    mask_BT: Tensor | None
    """False for padding; None where every token counts."""
    block_inputs: Sequence[Mapping[str, Any]]
    """Per block: the other keyword arguments of its forward (attention mask, position embeddings)."""


@dataclass(frozen=True)
class LinearResult:
    """The QAT start of one linear, and the figures to report."""

    state: LinearState
    report: dict[str, float | int] = field(default_factory=dict)


class BlockStream(Protocol):
    """Where decoder blocks come from and go to, one at a time."""

    num_blocks: int

    def num_stored(self) -> int:
        """Blocks 0 .. num_stored - 1 are stored already (by a run that was killed)."""

    def load(self, index: int) -> nn.Module:
        """A new module with the block's full-precision weights, on the compute device; no reference is kept."""

    def load_stored(self, index: int) -> nn.Module:
        """Likewise with the stored, quantized weights."""

    def store(self, index: int, block: nn.Module, results: Mapping[str, LinearResult]) -> None:
        """Keep a quantized block, atomically; the names are those within the block."""


class BlockRun:
    """One block with the calibration batches before it: what a method may do with the block it quantizes."""

    def __init__(self, block: nn.Module, batches: Sequence[Batch], index: int) -> None:
        self.block, self.batches, self.index = block, batches, index
        self._attention_outputs: list[Tensor] = []

    def linear(self, name: str) -> nn.Linear:
        linear = self.block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        return linear

    @torch.no_grad()
    def hessian(self, names: Sequence[str]) -> Tensor:
        """The Hessian [I, I] of the input that the linears `names` share, with the block as it is now.

        Asking for o_proj's says that q, k and v are final: attention is not computed again afterwards.
        """
        keeps_attention = tuple(names) == ATTENTION_END
        accumulator: HessianAccumulator | None = None
        for batch, x_BTI in self._inputs_of([self.linear(name) for name in names]):
            if keeps_attention:
                self._attention_outputs.append(x_BTI.to(batch.hidden_BTH.device))
            if accumulator is None:
                accumulator = HessianAccumulator(x_BTI.shape[-1], x_BTI.device)
            accumulator.add(x_BTI, batch.mask_BT)
        if accumulator is None:
            raise ValueError("there are no calibration sequences; give a calibration set that is not empty")
        return accumulator.hessian()

    def _inputs_of(self, linears: Sequence[nn.Module]) -> Iterator[tuple[Batch, Tensor]]:
        """Run every batch up to the first of `linears` and yield what it is given."""

        def stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            raise _Reached(inputs[0])

        handles = [linear.register_forward_pre_hook(stop) for linear in linears]
        try:
            for position, batch in enumerate(self.batches):
                try:
                    self._forward(position)
                except _Reached as reached:
                    yield batch, reached.x_BTI
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def advance(self) -> None:
        """Move the batches behind the block as it is now."""
        for position, batch in enumerate(self.batches):
            batch.hidden_BTH = self._forward(position).to(batch.hidden_BTH.device)

    def _forward(self, position: int) -> Tensor:
        batch, device = self.batches[position], next(self.block.parameters()).device
        inputs = {name: _to_device(value, device) for name, value in batch.block_inputs[self.index].items()}
        with self._attention_replayed(position, device):
            return self.block(batch.hidden_BTH.to(device), **inputs)

    @contextmanager
    def _attention_replayed(self, position: int, device: torch.device) -> Iterator[None]:
        """Inside, self_attn only applies o_proj to what it was given before, once that is known."""
        if len(self._attention_outputs) < len(self.batches):
            yield
            return
        attention, x_BTI = self.block.get_submodule("self_attn"), self._attention_outputs[position]
        o_proj = self.linear(ATTENTION_END[0])
        attention.forward = lambda *_args, **_kwargs: (o_proj(x_BTI.to(device)), None)
        try:
            yield
        finally:
            del attention.forward

    def replace(self, name: str, state: LinearState, scheme: Scheme) -> None:
        """Give the linear `name` the rounded weights of `state`; bias untouched."""
        linear = self.linear(name)
        rounded_OI = fake_quantize(state.weight, state.scale, state.zero, scheme, linear.weight.dtype)
        linear.weight = nn.Parameter(rounded_OI.detach(), requires_grad=False)


class _Reached(Exception):
    """Ends a block's forward as soon as the input that is sought has been seen."""

    def __init__(self, x_BTI: Tensor) -> None:
        super().__init__()
        self.x_BTI = x_BTI


BlockMethod = Callable[[BlockRun, Scheme], dict[str, LinearResult]]
"""Quantizes a block in place (with `BlockRun.replace`) and returns every linear's result by its name in the block."""
Progress = Callable[[int, int, dict[str, float]], None]
"""Called after each block: blocks done, blocks in all, figures of the block."""


def quantize_blocks(
    stream: BlockStream,
    batches: Sequence[Batch],
    method: BlockMethod,
    scheme: Scheme,
    progress: Progress = lambda done, total, info: None,
) -> None:
    """Quantize every block of `stream` in order with `method`; without batches (RTN) no block runs forward.

    Blocks that are stored already are only run through.
    """
    num_stored = stream.num_stored()
    for index in range(stream.num_blocks):
        start = time.perf_counter()
        info: dict[str, float] = {}
        if index >= num_stored:
            info = _quantize_block(stream, index, batches, method, scheme)
        elif num_stored < stream.num_blocks:
            BlockRun(stream.load_stored(index), batches, index).advance()
        progress(index + 1, stream.num_blocks, {"seconds": time.perf_counter() - start, **info})


def _quantize_block(
    stream: BlockStream, index: int, batches: Sequence[Batch], method: BlockMethod, scheme: Scheme
) -> dict[str, float]:
    run = BlockRun(stream.load(index), batches, index)
    _check_linears(run.block)
    results = method(run, scheme)
    stream.store(index, run.block, results)
    if index + 1 < stream.num_blocks:
        run.advance()
    return {"error": max(float(result.report["error"]) for result in results.values())}


def _check_linears(block: nn.Module) -> None:
    found = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    known = {name for group in LINEAR_GROUPS for name in group}
    if found != known:
        raise ValueError(
            f"unknown decoder layer {type(block).__name__}: its linears differ from those of Qwen2, Qwen3 and Llama in "
            f"{sorted(found ^ known)}; add its groups to quant.streaming.LINEAR_GROUPS"
        )


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to_device(item, device) for item in value)
    return value
