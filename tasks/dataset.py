"""The stage that brings a data set into the store: problems with answers and traces, or plain text."""

from __future__ import annotations

import hashlib

from tasks.data import sources
from tasks.data.benchmark_rows import benchmark_digest
from tasks.data.config import DatasetConfig
from tasks.data.hub import commit_of
from tasks.runtime.stage import Context, Metrics, stage


@stage(kind="dataset", source_digest=lambda config: source_digest(config))
def dataset(config: DatasetConfig, context: Context) -> Metrics:
    """Read, map, filter and sample; write data.parquet and dataset.json."""
    from tasks.data.making import make_dataset

    return make_dataset(config, context)


def source_digest(config: DatasetConfig) -> str:
    """What the stage will read from outside: the sha256 of local files' contents, or the commit of a hub data set."""
    if config.is_bundled:
        return hashlib.sha256(config.source.encode()).hexdigest()
    if config.benchmark is not None:
        return benchmark_digest(config.benchmark, config.source)
    if sources.is_local(config.source):
        return sources.files_digest(sources.local_files(config.source, config.split, config.subset))
    return commit_of(config.source, config.revision)
