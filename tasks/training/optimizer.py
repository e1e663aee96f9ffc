"""Optimizers and their parameter groups, chosen by parameter name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tasks.training.config import LoopConfig


@dataclass(frozen=True)
class GroupRule:
    """Parameters whose name matches `pattern` (re.search) get this learning rate; the first matching rule wins."""

    pattern: str
    learning_rate: float
    weight_decay: float = 0.0


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], rules: Sequence[GroupRule], default: GroupRule
) -> list[dict[str, Any]]:
    """Groups of the trainable parameters, one per rule that matches something, `default` first.

    Raises ValueError when a rule matches no trainable parameter: a group with a learning rate that trains nothing is
    a mistake in the configuration.
    """
    groups: dict[GroupRule, list[nn.Parameter]] = {rule: [] for rule in (default, *rules)}
    for name, parameter in named:
        if parameter.requires_grad:
            rule = next((r for r in rules if re.search(r.pattern, name)), default)
            groups[rule].append(parameter)
    if unused := [rule.pattern for rule in rules if not groups[rule]]:
        raise ValueError(f"no trainable parameter matches {unused}: check the pattern and what is frozen")
    return [
        {"params": parameters, "lr": rule.learning_rate, "weight_decay": rule.weight_decay}
        for rule, parameters in groups.items()
        if parameters
    ]


def adam(module: nn.Module, config: LoopConfig, rules: Sequence[GroupRule] = ()) -> list[torch.optim.Optimizer]:
    """Adam with decoupled weight decay; with the default decay of 0 this is the Adam of Tables 6 and 7."""
    default = GroupRule("", config.learning_rate, config.weight_decay)
    groups = parameter_groups(module.named_parameters(), rules, default)
    return [torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=1e-8)]


def muon_adam(
    module: nn.Module, config: LoopConfig, *, adam_pattern: str, adam_learning_rate: float
) -> list[torch.optim.Optimizer]:
    """Muon (torch.optim.Muon) at `config.learning_rate` for 2-D weights, Adam for the rest and for `adam_pattern`.

    Embeddings and the head are 2-D but belong to Adam (https://github.com/KellerJordan/Muon, README): name them in
    `adam_pattern`.
    """
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    by_muon = [(name, p) for name, p in trainable if p.ndim == 2 and not re.search(adam_pattern, name)]
    taken = {name for name, _ in by_muon}
    rest = [(name, p) for name, p in trainable if name not in taken]
    muon = torch.optim.Muon(by_muon, lr=config.learning_rate, weight_decay=config.weight_decay)
    groups = parameter_groups(rest, (), GroupRule("", adam_learning_rate, config.weight_decay))
    return [muon, torch.optim.AdamW(groups, lr=adam_learning_rate, betas=config.betas, eps=1e-8)]
