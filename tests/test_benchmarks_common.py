"""What the benchmarks' figures rest on, against plain references."""

from __future__ import annotations

import gzip
import json
import math
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import common
from benchmarks.common import fidelity, read_text, run_measured, windows


def tiny_model(seed):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def test_divergence_and_perplexity_equal_a_loop_in_float64(monkeypatch):
    monkeypatch.setattr(common, "TOKENS_AT_A_TIME", 5)  # several pieces, the last one shorter
    reference, model = tiny_model(0), tiny_model(1)
    ids_NT = torch.randint(0, 40, (3, 18), generator=torch.Generator().manual_seed(2))
    result = fidelity(reference, {"other": model}, ids_NT)
    kls, surprises = [], []
    for ids_T in ids_NT:
        p_TV, q_TV = (m(ids_T[None]).logits[0].detach().double().softmax(-1) for m in (reference, model))
        kls.append([sum(float(p * (p / q).log()) for p, q in zip(p_TV[t], q_TV[t], strict=True)) for t in range(17)])
        surprises += [-math.log(q_TV[t, ids_T[t + 1]]) for t in range(17)]
    means = torch.tensor(kls, dtype=torch.float64).mean(1)
    assert result["other"].kl == pytest.approx(float(means.mean()), rel=1e-4)
    assert result["other"].kl_error == pytest.approx(float(means.std()) / 3**0.5, rel=1e-3)
    assert result["other"].perplexity == pytest.approx(math.exp(sum(surprises) / len(surprises)), rel=1e-5)
    assert result["reference"].kl == 0


class Letters:
    """A tokenizer of one token per character."""

    def __call__(self, text, **_options):
        return {"input_ids": [ord(letter) for letter in text]}


def test_calibration_and_test_windows_do_not_overlap(tmp_path, monkeypatch):
    monkeypatch.setattr(common.AutoTokenizer, "from_pretrained", lambda *_args, **_options: Letters())
    (tmp_path / "text.txt").write_text("abcdefghijk")
    calibration_NT, test_NT = windows(tmp_path, tmp_path / "text.txt", 2, 3, 2)
    assert calibration_NT.tolist() == [[97, 98], [99, 100]]
    assert test_NT.tolist() == [[102, 103], [104, 105], [106, 107]]
    with pytest.raises(ValueError, match="11 tokens and 12 are needed"):
        windows(tmp_path, tmp_path / "text.txt", 3, 3, 2)


def test_json_lines_are_joined(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in ({"id": 1, "question": "q", "answer": "a"}, {"text": "t"}))
    assert read_text(path) == "q\na\n\nt"


def test_a_child_is_measured_and_its_failure_told(tmp_path):
    work = "held = bytearray(10**8); sum(range(3 * 10**7))"  # held for longer than the measurement looks away
    usage = run_measured([sys.executable, "-c", work], tmp_path / "log", {})
    assert usage.cpu_s > 0.05
    assert 100 < usage.peak_mb < 1000
    with pytest.raises(RuntimeError, match=r"exited with 3(.|\n)*no such model"):
        run_measured([sys.executable, "-c", "print('no such model'); exit(3)"], tmp_path / "log", {})
