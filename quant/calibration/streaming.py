"""Block-by-block PTQ: one decoder block in memory at a time, calibrated on the outputs of the earlier ones.

The linears of a block come in groups that share their inputs: {k, v, q}, o, {up, gate}, down.  GPTQ calibrates on the
quantized model: the block runs anew for each group, so that a group sees what the quantized ones before it give
(true-sequential order: ruikangliu/Quantized-Reasoning-Models, methods/gptq).  AWQ calibrates on the full-precision
model and sees all of a block in one forward pass (mit-han-lab/llm-awq:awq/quantize/pre_quant.py).

Peak memory is one block, the Hessian of one group, and per calibration token a hidden state and an attention output.
A killed run resumes after the last stored block: the hidden states are computed again through the stored blocks, or
through the full-precision ones.  That costs one forward pass per stored block, a fraction of what quantizing it took,
gives the same bits, and spares every block the writing of the whole calibration set's activations, which are larger
than the block.

Dimensions: B sequences of a batch, T tokens, H hidden size, I input features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from quant.calibration.activations import Keep, in_memory, release_free_memory
from quant.calibration.statistics import HessianAccumulator
from quant.decoder import ATTENTION, LINEAR_GROUPS, OUTPUT
from quant.grids.affine import LinearState, fake_quantize
from quant.grids.scheme import Scheme
from quant.student.site_tensors import site_tensors
from quant.transforms.rewrite import RewriteFactory

ATTENTION_END = (OUTPUT,)
"""The group whose inputs, then outputs are kept while a block is worked on: attention is its most expensive part and
would run three times more.  They are as large as the hidden states; the inputs of down_proj, thrice that, are not."""


@dataclass
class Batch:
    """Calibration sequences between two blocks; `hidden_BTH` is replaced as they move on."""

    hidden_BTH: Tensor
    mask_BT: Tensor | None
    """False for padding; None where every token counts."""
    block_inputs: Sequence[Mapping[str, Any]]
    """Per block: the other keyword arguments of its forward (attention mask, position embeddings)."""
    keep: Keep = in_memory
    """Where hidden states wait."""


@dataclass(frozen=True)
class LinearResult:
    """The QAT start of one linear, and the figures to report."""

    state: LinearState
    report: dict[str, float | int] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """What a module of the block was given for one batch, and what it gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


Partial = Callable[[float, dict[str, float]], None]
"""Called by a slow method while it works on a block: the share done, figures."""


class BlockStream(Protocol):
    """Where decoder blocks come from and go to, one at a time."""

    num_blocks: int

    def num_stored(self) -> int:
        """Blocks 0 .. num_stored - 1 are stored already (by a run that was killed)."""

    def load(self, index: int) -> nn.Module:
        """A new module with the block's full-precision weights, on the compute device; no reference is kept."""

    def load_stored(self, index: int) -> nn.Module:
        """Likewise with the stored, quantized weights."""

    def store(
        self, index: int, block: nn.Module, results: Mapping[str, LinearResult], further: Mapping[str, Tensor]
    ) -> None:
        """Keep a quantized block with whatever else of it the method changed (norms, biases), atomically.

        `further` is what training goes on from besides the linears' states.  The names are those within the block.
        """


class BlockRun:
    """One block with the calibration batches before it: what a method may do with the block it quantizes."""

    def __init__(
        self, block: nn.Module, batches: Sequence[Batch], index: int, progress: Partial = lambda share, info: None
    ) -> None:
        self.block, self.batches, self.index, self.progress = block, batches, index, progress
        self.further: dict[str, Tensor] = {}
        """What training goes on from besides the linears' states, by name in the block; a method may add to it."""
        self._o_inputs: list[Tensor] = []
        self._attention_outputs: list[Tensor] = []

    def linear(self, name: str) -> nn.Linear:
        linear = self.block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        return linear

    @torch.no_grad()
    def hessian(self, names: Sequence[str]) -> Tensor:
        """The Hessian [I, I] of the input that the linears `names` share, with the block as it is now.

        Asking for o_proj's says that q, k and v are final: once o_proj is replaced, attention does not run again.
        """
        keeps_attention = tuple(names) == ATTENTION_END
        linears = [self.linear(name) for name in names]
        accumulator = HessianAccumulator(linears[0].in_features, linears[0].weight.device)
        for batch, x_BTI in self._inputs_of(linears):
            if keeps_attention:
                self._o_inputs.append(batch.keep(x_BTI))
            accumulator.add(x_BTI, batch.mask_BT)
        release_free_memory()
        return accumulator.hessian()

    def _inputs_of(self, linears: Sequence[nn.Module]) -> Iterator[tuple[Batch, Tensor]]:
        """Run every batch up to the first of `linears` and yield what it is given."""
        reached: list[Tensor] = []

        def stop(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            reached.append(inputs[0])
            raise _Reached

        handles = [linear.register_forward_pre_hook(stop) for linear in linears]
        try:
            for position, batch in enumerate(self.batches):
                # The exception is gone before the input is used: its frames hold the activations of the pass.
                with suppress(_Reached):
                    self.forward(position)
                yield batch, reached.pop()
        finally:
            for handle in handles:
                handle.remove()

    def advance(self) -> None:
        """Move the batches behind the block as it is now."""
        for _ in self.advance_recorded(()):
            pass

    @torch.no_grad()
    def advance_recorded(self, names: Iterable[str]) -> Iterator[tuple[Batch, dict[str, Call]]]:
        """Move the batches likewise and yield each with how the modules `names` were called for it."""
        calls: dict[str, Call] = {}

        def recorder(name: str) -> Callable[..., None]:
            def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                calls[name] = Call(args, kwargs, output)

            return record

        modules = {name: self.block.get_submodule(name) for name in names}
        handles = [module.register_forward_hook(recorder(name), with_kwargs=True) for name, module in modules.items()]
        try:
            for position, batch in enumerate(self.batches):
                batch.hidden_BTH = batch.keep(self.forward(position))
                yield batch, dict(calls)
                calls.clear()
        finally:
            for handle in handles:
                handle.remove()

    def forward(self, position: int) -> Tensor:
        """What the block makes of a batch, computed on the block's device and in its dtype."""
        batch, parameter = self.batches[position], next(self.block.parameters())
        inputs = {name: _like(value, parameter) for name, value in batch.block_inputs[self.index].items()}
        with self._attention_replayed(position, parameter.device):
            return self.block(batch.hidden_BTH.to(parameter), **inputs)

    @contextmanager
    def _attention_replayed(self, position: int, device: torch.device) -> Iterator[None]:
        """Inside, self_attn gives what it gave before, once that is final."""
        if not self._attention_outputs:
            yield
            return
        attention, output_BTH = self.block.get_submodule(ATTENTION), self._attention_outputs[position].to(device)
        attention.forward = lambda *_args, **_kwargs: (output_BTH, None)
        try:
            yield
        finally:
            del attention.forward

    @torch.no_grad()
    def replace(self, name: str, state: LinearState, scheme: Scheme) -> None:
        """Give the linear `name` the rounded weights of `state`; bias untouched."""
        linear = self.linear(name)
        rounded_OI = fake_quantize(state.weight, state.scale, state.zero, scheme, linear.weight.dtype)
        linear.weight = nn.Parameter(rounded_OI, requires_grad=False)
        while (name,) == ATTENTION_END and self._o_inputs:  # forward: o_proj's hooks gave its inputs already
            output_BTH = linear.forward(self._o_inputs.pop(0).to(rounded_OI.device))
            self._attention_outputs.append(self.batches[len(self._attention_outputs)].keep(output_BTH))


class _Reached(Exception):
    """Ends a block's forward as soon as the input that is sought has been seen."""


Inputs = Literal["quantized", "full_precision"]


@dataclass(frozen=True)
class BlockMethod:
    """How a PTQ method treats a block."""

    quantize: Callable[[BlockRun, Scheme], dict[str, LinearResult]]
    """Quantizes it in place (with `BlockRun.replace`) and returns every linear's result by its name in the block."""
    inputs: Inputs = "quantized"
    """Whose outputs the next block is calibrated on: the quantized block's or the full-precision one's.  In the second
    case `quantize` itself moves the batches on (`BlockRun.advance`), before it changes the block."""
    learned_transforms: bool = False
    """The method learns transforms that training goes on to learn: states hold weights in the original basis."""
    needs_calibration: bool = True
    """Without it no block runs forward."""
    rewrite: RewriteFactory | None = None
    """Changes the model before its blocks are quantized; the stream applies it to what it reads."""


Progress = Callable[[float, int, dict[str, float]], None]
"""Called after each block, and by slow methods within one: blocks done, blocks in all, figures of the block."""


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
            info = _quantize_block(stream, index, batches, method, scheme, progress)
        elif num_stored < stream.num_blocks:
            load = stream.load_stored if method.inputs == "quantized" else stream.load
            BlockRun(load(index), batches, index).advance()
        progress(index + 1, stream.num_blocks, {"seconds": time.perf_counter() - start, **info})


def _quantize_block(
    stream: BlockStream, index: int, batches: Sequence[Batch], method: BlockMethod, scheme: Scheme, progress: Progress
) -> dict[str, float]:
    def partial(share: float, info: dict[str, float]) -> None:
        progress(index + share, stream.num_blocks, info)

    run = BlockRun(stream.load(index), batches, index, partial)
    _check_linears(run.block)
    results = method.quantize(run, scheme)
    stream.store(index, run.block, results, {**site_tensors(run.block), **run.further})
    if method.inputs == "quantized" and index + 1 < stream.num_blocks:
        run.advance()
    return {"error": max(float(result.report["error"]) for result in results.values())}


def _check_linears(block: nn.Module) -> None:
    found = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    known = {name for group in LINEAR_GROUPS for name in group}
    if found != known:
        raise ValueError(
            f"unknown decoder layer {type(block).__name__}: its linears differ from those of Qwen2, Qwen3 and Llama in "
            f"{sorted(found ^ known)}; add its groups to quant.decoder.INPUT_SITES"
        )


def _like(value: Any, parameter: Tensor) -> Any:
    """Tensors on the parameter's device, floating ones in its dtype."""
    if isinstance(value, Tensor):
        return value.to(parameter) if value.is_floating_point() else value.to(parameter.device)
    if isinstance(value, tuple):
        return tuple(_like(item, parameter) for item in value)
    return value
