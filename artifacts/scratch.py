"""Mid-stage state: folders that appear whole and sealed with checksums; a damaged one is set aside and told.

Whoever resumes asks `is_sound` first, and where the answer is no begins from an earlier state or anew.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from artifacts import manifest
from artifacts.disk import brief, disk_errors
from artifacts.files import flush, move_aside

KIND = "scratch"

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `folder`, sealed, when the block ends well.

    A kill, or an error inside, leaves `folder` as it was.
    """
    temporary = folder.with_name(f"tmp-{folder.name}")
    remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        entries = manifest.describe(temporary)
        manifest.seal(temporary, manifest.reference(KIND, entries), entries)
    except BaseException:
        remove(temporary)  # a full disk needs the space
        raise
    remove(folder)
    temporary.rename(folder)
    flush(folder.parent)


def is_sound(folder: Path) -> bool:
    """Whether `folder` is there with every byte as it was written; a damaged one is set aside, for whoever looks."""
    if not os.path.lexists(folder):
        return False
    try:
        found = manifest.problems(folder, manifest.sealed_as(folder), full=True)
    except (OSError, ValueError) as error:
        found = [f"{manifest.MANIFEST} unreadable: {error}"]
    if found:
        set_aside(folder, found[0])
    return not found


def set_aside(folder: Path, reason: str) -> None:
    """Rename mid-stage state that cannot be used to damaged-*, and say so in one line."""
    with disk_errors(folder.parent):
        now = move_aside(folder, folder.with_name(f"damaged-{folder.name}"))
    logger.warning(
        "damaged: %s (%s); set aside as %s, the stage begins before it", folder.name, brief(reason), now.name
    )


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
