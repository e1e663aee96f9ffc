"""The console script `reasoning-qat`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from artifacts.records import Record
from artifacts.store import Store, StoreError
from flows.config import ConfigError
from flows.graph import build_graph, check_stage_names
from flows.recipes import RECIPES, configured
from flows.server import ServerError, ServerLost
from flows.stage_runs import check_request
from flows.terminal import console, errors
from tasks.runtime.machine import version_differences
from tasks.runtime.processes import Terminated, raising_terminated
from tasks.runtime.stage import StageError

app = typer.Typer(
    name="reasoning-qat",
    help="Turn a reasoning LLM into a low-bit one that still reasons: a workflow of cached stages.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_TERMINATED = 2, 1, 130, 143


def recipe_names() -> list[str]:
    """Names of the recipes, for completion."""
    return list(RECIPES)


Recipe = Annotated[str, typer.Argument(help="A recipe; see `reasoning-qat recipes`.", autocompletion=recipe_names)]
Sets = Annotated[
    list[str], typer.Option("--set", help="section.field=value on all branches; label:section.field=value on one.")
]
Branches = Annotated[list[str], typer.Option("--branch", help="Only this branch, or those whose names hold this text.")]
Force = Annotated[list[str], typer.Option("--force", help="Run this stage again although it is cached.")]
Until = Annotated[str | None, typer.Option("--until", help="This stage and what it needs, for example ptq_init.")]
Checkpoint = Annotated[
    str | None, typer.Option("--checkpoint", help="Evaluate the checkpoint with this digest instead of the branches.")
]


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """One message with the remedy instead of a traceback for everything a user can mend."""
    try:
        with raising_terminated():
            yield
    except KeyboardInterrupt as error:
        terminated = isinstance(error, Terminated)
        happened = "stopped" if terminated else "interrupted"
        errors.print(f"\n{happened}; the same command resumes from the last checkpoint", style="yellow")
        raise typer.Exit(EXIT_TERMINATED if terminated else EXIT_INTERRUPTED) from None
    except ConfigError as error:
        _fail(error, EXIT_BAD_INPUT)
    except ServerLost as error:
        _tell(error)
        os._exit(EXIT_FAILED)
    except (StoreError, ServerError, StageError) as error:
        _fail(error, EXIT_FAILED)


def _tell(error: Exception) -> None:
    notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", []))
    errors.print(f"[bold red]error:[/] {escape(str(error) + notes)}", highlight=False)


def _fail(error: Exception, code: int) -> None:
    _tell(error)
    raise typer.Exit(code) from error


def _check_output(folder: Path) -> None:
    """Make the folder of a report before anything is computed for it; ConfigError where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except (OSError, ValueError):
        writable = False
    if not writable:
        raise ConfigError(f"--output: cannot write to the folder {str(folder)[-150:]!r}: name another")


@app.command(
    epilog="Examples:  reasoning-qat run demo   |   reasoning-qat run tiny_w2g128 --set kd_train.steps=20   |   "
    "reasoning-qat run qwen3_0_6b_w3g128 --set model=/models/Qwen3-0.6B --until ptq_init"
)
def run(
    recipe: Recipe,
    sets: Sets = [],  # noqa: B006 - typer reads the default
    branch: Branches = [],  # noqa: B006
    force: Force = [],  # noqa: B006
    until: Until = None,
    only_cached: Annotated[bool, typer.Option("--only-cached", help="Fail rather than compute.")] = False,
    checkpoint: Checkpoint = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Stages at a time.")] = None,
    output: Annotated[Path, typer.Option("--output", help="Folder for the report.")] = Path("outputs"),
) -> None:
    """Run a recipe: every stage that is not cached, then the report."""
    from flows.server import server

    with clear_errors():
        if until in (None, "report"):
            _check_output(output / recipe if recipe in RECIPES else output)
        with server() as ready:
            check_request(recipe, sets, branch, checkpoint, [*force, *([until] if until else [])])
            errors.print(f"[dim]Prefect UI of this run: {escape(ready())}[/]", highlight=False, soft_wrap=True)
            from flows.reasoning_qat import reasoning_qat

            report = reasoning_qat(
                recipe=recipe,
                overrides=tuple(sets),
                branches=tuple(branch),
                force=tuple(force),
                until=until,
                only_cached=only_cached,
                checkpoint=checkpoint,
                jobs=jobs,
            )
        if report is not None:
            _show_report(recipe, str(report), output)


def _show_report(recipe: str, report: str, output: Path) -> None:
    from flows.reporting import copy_report, print_ladder

    store = Store()
    folder = store.path(store.resolve(report))
    print_ladder(folder, console)
    console.print(f"report: {copy_report(folder, output / recipe)}", highlight=False, soft_wrap=True)


@app.command(epilog="Example:  reasoning-qat plan demo --set kd_train.learning_rate=2e-4")
def plan(
    recipe: Recipe,
    sets: Sets = [],  # noqa: B006
    branch: Branches = [],  # noqa: B006
    force: Force = [],  # noqa: B006
    until: Until = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Show per stage HIT or MISS and why, without running anything."""
    with clear_errors():
        from flows.plan import plan_graph

        configured_run = configured(recipe, sets, branch, checkpoint)
        check_stage_names(force)
        graph = build_graph(configured_run, until)
        planned = plan_graph(graph, Store(), force)
    table = Table("stage", "status", "why", "artifact", title=f"{recipe}: {len(configured_run.branches)} branches")
    for item in planned:
        colour = "cyan" if item.status == "HIT" else "yellow"
        table.add_row(
            escape(item.node.label),
            f"[{colour}]{item.status}[/]",
            escape(item.reason),
            item.ref.short if item.ref else "",
        )
    console.print(table)
    hits = sum(item.status == "HIT" for item in planned)
    console.print(
        f"{len(planned)} stages ({graph.num_stages_unshared()} if no branch shared any): "
        f"{hits} cached, {len(planned) - hits} to run; then the report"
    )


@app.command()
def recipes() -> None:
    """List the recipes."""
    table = Table("recipe", "branches", "what it is")
    for name, make in RECIPES.items():
        made = make()
        table.add_row(name, str(len(made.branches)), made.description)
    console.print(table)


@app.command()
def ls(
    stage: Annotated[str | None, typer.Option(help="Only artifacts of this stage.")] = None,
    most: Annotated[int, typer.Option("--most", min=0, help="The newest so many; 0 lists all.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON record per line, all of them.")] = False,
) -> None:
    """List the artifacts in the store, newest last."""
    with clear_errors():
        records = [record for record in Store().records() if stage in (None, record.stage)]
    if as_json:
        for record in records:
            typer.echo(json.dumps(record.to_dict()))
        return
    if older := max(0, len(records) - most) if most else 0:
        console.print(f"[dim]{older:,} older ones are left out; --most 0 lists all[/]")
        records = records[older:]
    made, digest = (Column(name, no_wrap=True, min_width=width) for name, width in (("made", 16), ("digest", 12)))
    kind, result = (Column(name, overflow="fold") for name in ("kind", "result"))
    table = Table(made, "stage", kind, digest, "seconds", result)
    for record in records:
        seconds = f"{record.provenance.get('wall_seconds', 0):.1f}"
        table.add_row(record.created[:16], record.stage, record.ref.kind, record.ref.short, seconds, _result(record))
    console.print(table)


def _result(record: Record) -> str:
    metrics = record.provenance.get("metrics", {})
    shown = {k: v for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return escape("  ".join(f"{k} {v:.4g}" for k, v in list(shown.items())[:3]))


@app.command()
def show(
    digest: Annotated[str, typer.Argument(help="A digest, or a unique beginning of one.")],
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file again.")] = False,
) -> None:
    """Show an artifact: where it is, how it was made, and whether it is intact."""
    from flows.evaluations import KIND, show_evaluation, show_telemetry

    with clear_errors():
        store = Store()
        ref = store.resolve(digest)
        problems = store.verify(ref, full=verify)
        aside = store.quarantine(ref, "; ".join(problems)) if problems and verify else None
        path = aside or store.folder(ref)
    intact = "NO: " + "; ".join(problems) if problems else f"yes ({'hashes' if verify else 'sizes'})"
    console.print(f"[bold]{ref.kind}[/] {ref.digest}", highlight=False, soft_wrap=True)
    console.print(f"path   {path}\nintact {escape(intact)}", soft_wrap=True)
    for record in (r for r in store.records() if r.ref == ref):
        console.print_json(json.dumps(record.to_dict()))
        for difference in version_differences(record):
            console.print(f"[yellow]made with other versions[/]: {escape(difference)}", highlight=False)
        if record.telemetry is not None:
            show_telemetry(store, record.telemetry, console)
    if problems:
        done = "set aside" if aside else "the next run that meets it, or `show --verify`, sets it aside"
        errors.print(f"{done}; run the recipe that made it: its stage is computed again")
        raise typer.Exit(EXIT_FAILED)
    if ref.kind == KIND:
        with clear_errors():
            show_evaluation(store.path(ref), console)


@app.command(epilog="Example:  reasoning-qat compare 3f2a91 b07c44 --output regressions.html")
def compare(
    before: Annotated[str, typer.Argument(help="Digest of an evaluation, or a unique beginning of one.")],
    after: Annotated[str, typer.Argument(help="The one to compare with it, on the same problems and seeds.")],
    output: Annotated[Path, typer.Option("--output", help="The page to write.")] = Path("outputs/regressions.html"),
    most: Annotated[int, typer.Option("--most", min=1, help="Regressions on the page.")] = 50,
) -> None:
    """Compare two evaluations: paired differences, and a page of the problems that were lost."""
    from flows.evaluations import compare_evaluations

    with clear_errors():
        _check_output(output.parent)
        if output.is_dir():
            raise ConfigError(f"--output: {str(output)[-150:]!r} is a folder: name a file in it")
        page = compare_evaluations(Store(), before, after, output, most, console)
    console.print(f"page: {page}", highlight=False, soft_wrap=True)


@app.command()
def serve(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on loopback.")] = 4200,
) -> None:
    """Start the Prefect server, a work pool, the deployments and a worker on loopback, until Ctrl-C."""
    from flows.serve import serve as serve_forever

    with clear_errors():
        serve_forever(port, errors)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    app()
