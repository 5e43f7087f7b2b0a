"""Runs an experiment and says what came out of it, in the terminal and in the folder."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vllm_agentserve.bench.cell_table import cell_tables, folders_under
from vllm_agentserve.bench.experiment import Experiment
from vllm_agentserve.bench.plan import Plan
from vllm_agentserve.bench.progress import Progress
from vllm_agentserve.bench.records import Results
from vllm_agentserve.bench.report import PAGE, TABLE, describe_workload, row_label, rows, write_report
from vllm_agentserve.bench.sessions import WorkloadError
from vllm_agentserve.bench.summary import Analysis


def run_plan(plan: Plan, folder: Path, console: Console, conclude: Callable[[Analysis], str] = lambda _: "") -> int:
    """Runs an experiment and reports what was measured, also after an error or Ctrl-C; returns the exit code.

    Args:
        conclude: what to say under the table when everything was measured.
    """
    from vllm_agentserve.bench.endpoint import EndpointError
    from vllm_agentserve.bench.server import ServerError

    folders = [folder / cell.name for cell in plan.cells]
    try:
        with Progress(console) as progress:
            experiment = Experiment(plan, folder, progress)
            experiment.run()
    except KeyboardInterrupt:
        console.print("\nStopped; no server is left running.")
        report_partial(folders, console)
        return 130
    except (ServerError, EndpointError, WorkloadError, FileExistsError) as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        if not isinstance(error, FileExistsError):
            report_partial(folders, console)
        return 1
    for one in folders:
        analysis = write_report(Results(one))
        show(analysis, one, console)
        if words := conclude(analysis):
            console.print(words, soft_wrap=True)
    if len(folders) > 1:
        print_cells([folder], console)
    return 0


def report_partial(folders: Sequence[Path], console: Console) -> None:
    for folder in folders:
        results = Results(folder)
        if any(one.error is None for one in results.rounds()):
            show(write_report(results), folder, console)
        else:
            console.print(f"No run of any arm ended; what there is lies in {folder}.", markup=False)


def print_cells(folders: Sequence[Path], console: Console) -> int:
    """Prints the results of several folders beside each other; returns the exit code."""
    found = folders_under(folders)
    if not found:
        console.print(f"error: no results under {', '.join(map(str, folders))}", markup=False, soft_wrap=True)
        return 2
    try:
        words = cell_tables(found)
    except WorkloadError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    console.print(words, markup=False, highlight=False, soft_wrap=True)
    return 0


def show(analysis: Analysis, folder: Path, console: Console) -> None:
    """Prints the table and where the rest is."""
    names = list(analysis.figures)
    table = Table(title=describe_workload(analysis.experiment).replace("`", ""), title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for metric, cells in rows(analysis, intervals=False):
        table.add_row(row_label(metric), *cells)
    console.print(table)
    console.print(
        f"In brackets: ratio to {analysis.baseline}; intervals are in the page and the table to paste.", markup=False
    )
    for note in analysis.summary["notes"]:
        console.print(f"- {note}", markup=False, soft_wrap=True)
    console.print(f"Page: {folder / PAGE}   table to paste: {folder / TABLE}", markup=False, soft_wrap=True)


def new_folder(name: str) -> Path:
    """bench-results/NAME-1, or the next number that is free."""
    plain = "".join(c if c.isalnum() or c in "-._" else "-" for c in name)
    number = 1
    while (folder := Path("bench-results") / f"{plain}-{number}").exists():
        number += 1
    return folder
