"""One batch of requests, decoded to its end with a Hugging Face causal language model.

Precision: the model computes in its own dtype; logits are cast to float32 before softmax and sampling.
Dimensions: B live rows, N new tokens, L prompt length of the batch, S cache slots, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from transformers import DynamicCache, PreTrainedModel

from tasks.sampling.draws import sample_tokens, uniform_streams
from tasks.sampling.engine import Completion, OnTokens, Request, SamplingParams
from tasks.sampling.kv_cache import DecodeCache

# Prompt tokens per prefill pass: larger passes only grow the activations.
PREFILL_TOKENS = 8192
# Cache slots reserved at a time: completions mostly end long before max_new_tokens.
SLOT_STEP = 64
# The number of decoded rows is rounded up to a multiple of this, finished rows filling up: oneDNN compiles a
# kernel for every new number of rows (bfloat16 on a CPU took about a tenth more time without this).
ROW_STEP = 32


class DecodeBatch:
    """The rows of one batch: row i belongs to request indices[i], rows past len(indices) are fillers.

    Row tensors are reordered together when sequences end.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pad_token_id: int,
        indices: list[int],
        requests: Sequence[Request],
        sampling: SamplingParams,
        limit: int,
    ) -> None:
        self.model = model
        self.pad_token_id = pad_token_id
        self.sampling = sampling
        self.limit = limit
        self.indices = list(indices)
        self.prompts = [requests[i].prompt_ids for i in indices]
        device = model.device
        num_rows, num_new = len(indices), sampling.max_new_tokens
        self.stop = torch.tensor(sampling.stop_token_ids, dtype=torch.long, device=device)
        self.position_B = torch.tensor([len(prompt) for prompt in self.prompts], device=device)
        self.prompt_length = len(self.prompts[0])
        self.start_B = self.prompt_length - self.position_B
        self.token_BN = torch.zeros(num_rows, num_new, dtype=torch.long, device=device)
        self.logprob_BN = torch.zeros(num_rows, num_new, device=device)
        seeds = [requests[i].seed for i in indices]
        num_draws = num_new if sampling.temperature > 0 else 1
        self.uniform_BN = uniform_streams(seeds, num_draws).to(device)
        self.mask_BS: torch.Tensor | None = None

    def run(self, on_tokens: OnTokens | None) -> Iterator[tuple[int, Completion]]:
        """Decode until every row has ended; yields (request index, completion) as each does."""
        logits_BV = self._prefill()
        for step in range(self.sampling.max_new_tokens):
            token_B, logprob_B = sample_tokens(
                logits_BV,
                self.uniform_BN[:, step % self.uniform_BN.shape[1]],
                self.sampling.temperature,
                self.sampling.top_p,
            )
            self.token_BN[:, step] = token_B
            self.logprob_BN[:, step] = logprob_B
            if on_tokens is not None:
                on_tokens()
            yield from self._finish(step + 1)
            if not self.indices:
                return
            logits_BV = self._decode(self.token_BN[:, step])

    def _prefill(self) -> torch.Tensor:
        """Compute each different prompt once; the next-token logits [B, V] of every row."""
        self.cache = DecodeCache(self.model.config.num_hidden_layers, len(self.prompts), self.prompt_length)
        logits, first_row = [], 0
        for group in _prefill_groups(self.prompts):
            part = DynamicCache()
            length = max(len(prompt) for prompt, _ in group)
            ids = [(self.pad_token_id,) * (length - len(prompt)) + prompt for prompt, _ in group]
            pads = torch.tensor([length - len(prompt) for prompt, _ in group], device=self.model.device)
            position = torch.arange(length, device=self.model.device)[None] - pads[:, None]
            last_logits = self.model(
                input_ids=torch.tensor(ids, device=self.model.device),
                attention_mask=(position >= 0).long(),
                position_ids=position.clamp(min=0),
                past_key_values=part,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            source = [row for row, (_, count) in enumerate(group) for _ in range(count)]
            source_rows = torch.tensor(source, device=self.model.device)
            self.cache.place(part, first_row, source_rows)
            first_row += len(source)
            logits.append(last_logits[source_rows])
        return torch.cat(logits)

    def _decode(self, token_B: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] after one more token per row."""
        used = self.cache.get_seq_length() + 1
        if used > self.cache.num_slots:
            self.cache.reserve(min(used + SLOT_STEP + used // 4, self.prompt_length + self.sampling.max_new_tokens))
            self.mask_BS = None
        if self.mask_BS is None:
            self.mask_BS = self._padding_mask()
        logits_BV = self.model(
            input_ids=token_B[:, None],
            attention_mask=self.mask_BS[:, None, None, :used],
            position_ids=self.position_B[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        self.position_B = self.position_B + 1
        return logits_BV

    def _padding_mask(self) -> torch.Tensor:
        """Added to attention scores: the lowest number left of a row's prompt, else 0, [B, S]."""
        slot_S = torch.arange(self.cache.num_slots, device=self.model.device)
        mask_BS = torch.zeros(len(self.start_B), len(slot_S), dtype=self.model.dtype, device=self.model.device)
        return mask_BS.masked_fill_(slot_S < self.start_B[:, None], torch.finfo(self.model.dtype).min)

    def _finish(self, num_new: int) -> Iterator[tuple[int, Completion]]:
        """Hand out the sequences that have ended after `num_new` tokens and drop them from the batch."""
        num_live = len(self.indices)
        stopped_B = torch.isin(self.token_BN[:num_live, num_new - 1], self.stop)
        ended_B = stopped_B | (self.position_B[:num_live] + 1 >= self.limit)
        if num_new == self.sampling.max_new_tokens:
            ended_B = torch.ones_like(ended_B)
        ended_rows = ended_B.nonzero().squeeze(1)
        if not len(ended_rows):
            return
        tokens, logprobs = self.token_BN[ended_rows, :num_new].tolist(), self.logprob_BN[ended_rows, :num_new].tolist()
        rows, stopped = ended_rows.tolist(), stopped_B[ended_rows].tolist()
        for row, token_ids, row_logprobs, stop in zip(rows, tokens, logprobs, stopped, strict=True):
            yield self.indices[row], Completion(tuple(token_ids), tuple(row_logprobs), "stop" if stop else "length")
        self._drop(set(rows))

    def _drop(self, ended: set[int]) -> None:
        """Move live rows from the end into ended ones, then cut the batch to a multiple of ROW_STEP rows."""
        num_live = len(self.indices) - len(ended)
        hole_list = [row for row in sorted(ended) if row < num_live]
        mover_list = [row for row in range(num_live, len(self.indices)) if row not in ended]
        for hole, mover in zip(hole_list, mover_list, strict=True):
            self.indices[hole] = self.indices[mover]
        del self.indices[num_live:]
        holes = torch.tensor(hole_list, dtype=torch.long, device=self.model.device)
        movers = torch.tensor(mover_list, dtype=torch.long, device=self.model.device)
        num_rows = min(len(self.start_B), -(-num_live // ROW_STEP) * ROW_STEP)
        self.cache.drop(holes, movers, num_rows)
        for name in ("position_B", "start_B", "token_BN", "logprob_BN", "uniform_BN"):
            tensor = getattr(self, name)
            tensor[holes] = tensor[movers]
            setattr(self, name, tensor[:num_rows])
        self.mask_BS = None


def _prefill_groups(prompts: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[tuple[int, ...], int]]]:
    """Split prompts, sorted by falling length and equal ones side by side, into passes of (prompt, count)."""
    group: list[tuple[tuple[int, ...], int]] = []
    for prompt, same in groupby(prompts):
        if group and (len(group) + 1) * len(group[0][0]) > PREFILL_TOKENS:
            yield group
            group = []
        group.append((prompt, len(list(same))))
    yield group
