"""Data sets on the hub: always one commit, which the key holds and the stage loads."""

from __future__ import annotations

import re
from functools import cache

from tasks.data.tables import HubTable
from tasks.data.wording import first_line, shorten
from tasks.runtime.stage import StageError

ASK_SECONDS = 10
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REMEDY = "check the name and the network, or give a local file instead"


@cache
def commit_of(source: str, revision: str | None, remedy: str = "") -> str:
    """The commit that a branch, a tag or (None) the newest state of a hub data set is; a commit is itself, unasked.

    Asked once per process, so that all of a run means the same.  StageError where the hub does not say.
    """
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(source, revision=revision, timeout=ASK_SECONDS).sha
    except Exception as error:  # of the network, the login, the name: the hub's library has an error for each
        raise _unasked(source, revision, first_line(error, 60), remedy) from error
    if commit is None:
        raise _unasked(source, revision, "no commit in its answer", remedy)
    return commit


def hub_table(source: str, subset: str | None, split: str, commit: str, remedy: str = _REMEDY) -> HubTable:
    """A hub data set at a commit; StageError with the remedy if it cannot be had."""
    import datasets

    name = shorten(source, 50)
    try:
        loaded = datasets.load_dataset(source, subset, split=split, revision=commit)
    except ValueError as error:  # an unknown subset or split; the message lists those there are
        raise StageError(f"data set {name!r}: {shorten(error, 200)}") from error
    except Exception as error:  # of the network, the login, a file in it
        why = first_line(error, 60)
        raise StageError(
            f"cannot fetch data set {name!r} (revision {commit}) from the hub ({why}); {remedy}"
        ) from error
    return HubTable(loaded, name)


def _unasked(source: str, revision: str | None, why: str, remedy: str) -> StageError:
    wanted = f"{shorten(source, 50)!r} ({shorten(revision or 'newest', 40)})"
    remedy = remedy or "set revision to a commit (40 hex digits), or give a local file instead"
    return StageError(f"the hub does not say which commit of data set {wanted} to take ({why}): {remedy}")
