"""The flow "reasoning-qat": calibrate -> ptq_init -> kd_train -> grpo_train -> evaluate per branch, then report."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Sequence
from typing import Annotated

from prefect import flow
from prefect.exceptions import ExternalSignal
from prefect.futures import wait
from pydantic import AfterValidator, Field

from artifacts.refs import Ref
from artifacts.store import Store
from flows.config import RunConfig, nearest
from flows.display import RunDisplay
from flows.graph import STAGE_NAMES, Graph, build_graph, check_stage_names, evaluation_roles
from flows.prefect_process import end_with_parent
from flows.publish import publish_lineage, publish_report
from flows.recipes import RECIPES, configured
from flows.reporting import report_run
from flows.runner import submit_graph
from flows.stage_runs import Resources
from flows.terminal import errors
from tasks.runtime.execute import Outcome
from tasks.runtime.executor import StageExecutor
from tasks.runtime.prefect_tasks import TaskOptions, stage_task


def _known_recipe(name: str) -> str:
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; {nearest(name, list(RECIPES))}")
    return name


def _known_stage(name: str) -> str:
    check_stage_names([name])
    return name


# The UI shows the names as a choice; a name typed on the command line is checked before the run starts.
RecipeName = Annotated[str, AfterValidator(_known_recipe), Field(json_schema_extra={"enum": list(RECIPES)})]
StageName = Annotated[str, AfterValidator(_known_stage), Field(json_schema_extra={"enum": list(STAGE_NAMES)})]


@flow(name="reasoning-qat", flow_run_name="{recipe}", persist_result=False)
def reasoning_qat(
    recipe: RecipeName = "tiny_w2g128",
    overrides: tuple[str, ...] = (),
    branches: tuple[str, ...] = (),
    force: tuple[StageName, ...] = (),
    until: StageName | None = None,
    only_cached: bool = False,
    checkpoint: str | None = None,
    jobs: int | None = None,
) -> str | None:
    """Turn a reasoning model into a low-bit one that still reasons: quantize, distil, reinforce, evaluate, report.

    Returns the reference of the report, or None when `until` ends the run before it.

    Args:
        recipe: a complete configuration
        overrides: section.field=value, as on the command line's --set
        branches: only the branches whose label contains one of these
        force: stages to run again although they are cached
        until: the last stage to run
        only_cached: fail rather than compute a stage that is not cached (forced ones are computed)
        checkpoint: evaluate the checkpoint with this digest instead of the branches
        jobs: stages at a time; by default 1 on a GPU and the number of cores on a CPU
    """
    if "PREFECT__FLOW_RUN_ID" in os.environ:  # a process of a Prefect worker's: a killed worker leaves no stage behind
        end_with_parent(os.getppid(), signal.SIGTERM)
    run = configured(recipe, overrides, branches, checkpoint)
    graph = build_graph(run, until)
    with_report = until in (None, "report") and any(map(evaluation_roles, graph.roles.values()))
    command = again(recipe, overrides, checkpoint) if with_report else None
    report = run_graph(run, graph, force=force, only_cached=only_cached, jobs=jobs, report_command=command)
    return None if report is None else str(report)


def again(recipe: str, overrides: Sequence[str], checkpoint: str | None) -> str:
    """The command that runs one row of the ladder again; BRANCH stands for its label."""
    parts = ["reasoning-qat run", recipe, *(f"--set {shlex.quote(override)}" for override in overrides)]
    return " ".join([*parts, f"--checkpoint {checkpoint}" if checkpoint else "--branch BRANCH"])


def run_graph(
    run: RunConfig,
    graph: Graph,
    *,
    force: Sequence[str],
    only_cached: bool,
    jobs: int | None,
    report_command: str | None,
) -> Ref | None:
    """Run every node of the graph inside the current Prefect flow run, then the report of the branches.

    Raises the error of a stage that reads from outside the store before any other stage runs; else the first in the
    order of the data flow, after the stages that do not depend on it have ended.
    """
    check_stage_names(force)
    store, resources = Store(), Resources.detect(jobs)
    executor = StageExecutor(resources.jobs, resources.num_threads)
    try:
        with RunDisplay(errors, len(graph.nodes) + int(report_command is not None)) as display:
            options = {"only_cached": only_cached, "on_event": display}
            futures = submit_graph(graph, store, executor, resources, options=options, forced=force)
            wait(list(futures.values()))
            outcomes: dict[str, Outcome] = {identity: future.result() for identity, future in futures.items()}
            publish_lineage(run, graph, outcomes)
            if report_command is None:
                return None
            report, inputs = report_run(run, graph, outcomes, store, command=report_command, force="report" in force)
            options_of_report = TaskOptions(executor, on_event=display)
            outcome = stage_task(report.stage).submit("report", report, options_of_report, inputs).result()
            publish_report(run, store.path(outcome.ref))
            return outcome.ref
    except (KeyboardInterrupt, ExternalSignal):  # Ctrl-C, SIGTERM, cancelled by Prefect: nobody waits for the stages
        executor.kill()
        raise
    finally:
        executor.close()
