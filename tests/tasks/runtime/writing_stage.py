"""A stage that writes a megabyte by one of the libraries that stages write with."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Literal

from artifacts import scratch
from tasks.runtime.stage import Context, Metrics, StageConfig, stage

Library = Literal["python", "safetensors", "pyarrow", "torch", "numpy", "tokenizers", "sqlite", "scratch"]


class WritingConfig(StageConfig):
    library: Library
    size: int = 1 << 20


@stage(kind="text")
def writing(config: WritingConfig, context: Context) -> Metrics:
    write(config.library, context.output / "file", config.size, context.scratch)
    return {}


def write(library: Library, path: Path, size: int, mid_stage: Path) -> None:
    import numpy as np

    noise = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    if library == "python":
        path.write_bytes(noise.tobytes())
    elif library in ("safetensors", "scratch"):
        from safetensors.numpy import save_file

        if library == "safetensors":
            save_file({"a": noise}, path)
            return
        with scratch.writing(mid_stage / "state") as inside:
            save_file({"a": noise}, inside / "file")
        path.write_bytes(b"done")
    elif library == "pyarrow":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"a": noise}), path)
    elif library == "torch":
        import torch

        torch.save(torch.from_numpy(noise), path)
    elif library == "numpy":
        np.save(path.with_suffix(".npy"), noise)
    elif library == "tokenizers":
        from tokenizers import Tokenizer, models

        Tokenizer(models.WordLevel({f"token {i}": i for i in range(size // 16)}, "token 0")).save(str(path))
    elif library == "sqlite":
        import sqlite3

        with closing(sqlite3.connect(path)) as database, database:
            database.execute("create table a (b blob)")
            database.execute("insert into a values (?)", (noise.tobytes(),))
