"""``weightdiff compare``: two checkpoints in, tables in the terminal and files out."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from weightdiff.compare import Comparison

_WIDE = 12  # layers that fit beside each other in 80 columns


@click.command()
@click.argument("ckpt_a", type=click.Path(path_type=Path))
@click.argument("ckpt_b", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Write tensors.parquet, units.parquet, meta.json and compare.html to this directory.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
@click.option("--heads/--no-heads", default=True, help="Rows for every attention head.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: the CPUs of this process.")
@click.option("--sha256", is_flag=True, help="Hash the weight files, however large.")
@click.option("--allow-unmatched", is_flag=True, help="Exit 0 when some tensors stay unmatched.")
def compare(
    ckpt_a: Path,
    ckpt_b: Path,
    out: Path | None,
    as_json: bool,
    heads: bool,
    threads: int | None,
    sha256: bool,
    allow_unmatched: bool,
) -> None:
    """Measure what changed from CKPT_A to CKPT_B, per matrix, layer and component.

    A checkpoint is a local directory in Hugging Face's format or one .safetensors file.
    rel is the norm of the change over the norm of A; enrichment is a component's share of the
    squared change over its share of the parameters, 1 being nothing special. Without --out
    nothing is written.

    Exit code: 1 when the two share no tensor, 3 when some tensors stay unmatched.
    """
    from weightdiff.artefact import output_dir
    from weightdiff.compare import compare as compare_checkpoints
    from weightdiff.compare import unmatched

    if out is not None:
        out = output_dir(out)
    made = compare_checkpoints(
        ckpt_a, ckpt_b, heads=heads, threads=threads, sha256=True if sha256 else None
    )
    if as_json:
        click.echo(made.to_json())
    else:
        _show(made)
    for warning in made.meta["warnings"]:
        click.echo(f"note: {warning}", err=True)
    if out is not None:
        made.save(out)
        click.echo(f"written to {out / 'compare.html'}", err=True)
    if unmatched(made.meta) and not allow_unmatched:
        click.echo(
            f"{unmatched(made.meta)} tensors could not be compared "
            "(--allow-unmatched makes that exit 0)",
            err=True,
        )
        raise click.exceptions.Exit(3)


def _show(made: "Comparison") -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=False)
    meta, total = made.meta, made.total
    console.print(Text(f"A  {meta['a']['path']}"), Text(f"B  {meta['b']['path']}"), sep="\n")
    console.print(
        f"{total['numel']:,} parameters, ‖Δ‖/‖A‖ {total['rel']:.3g}, "
        f"unchanged bits {total['unchanged_bits']:.1%}, {meta['seconds']:.2f} s\n"
    )
    _show_layers(console, made)
    _show_components(console, made)
    _show_largest(console, made)


def _show_layers(console: "Console", made: "Comparison") -> None:
    """Print rel by component × layer; many layers become rows, as a terminal is narrow."""
    table = made.columns("layer", "component")
    names, at = table["component"].tolist(), table["layer"].tolist()
    values = {(n, c): rel for n, c, rel in zip(at, names, table["rel"].tolist(), strict=True)}
    layers = sorted({layer for layer, _ in values if layer >= 0})
    inside = [c for c in ("attn", "mlp", "norm", "other") if any((n, c) in values for n in layers)]
    if not layers:
        return
    if len(layers) <= _WIDE:
        grid = _table("rel by layer", "", *map(str, layers))
        for name in inside:
            grid.add_row(name, *(_cell(values.get((layer, name))) for layer in layers))
    else:
        grid = _table("rel by layer", "layer", *inside)
        for layer in layers:
            grid.add_row(str(layer), *(_cell(values.get((layer, name))) for name in inside))
    console.print(grid)


def _show_components(console: "Console", made: "Comparison") -> None:
    summary = made.summary_columns()
    heads = ("component", "rel", "‖Δ‖² share", "params", "enrichment", "same bits", "≤ 1e-5")
    names = ("rel", "share_sq", "share_numel", "enrichment", "unchanged_bits", "unchanged_1e-5")
    table = _table("components", *heads)
    for row, name in enumerate(summary["component"]):
        values = [summary[column][row] for column in names]
        table.add_row(name, *(_show_value(c, v) for c, v in zip(names, values, strict=True)))
    console.print(table)


def _show_largest(console: "Console", made: "Comparison", count: int = 10) -> None:
    import numpy as np

    table = made.columns("layer", "matrix", "shape")
    names = ("rel", "share_sq", "enrichment", "max_abs")
    grid = _table("largest change", "layer", "matrix", "shape", "rel", "‖Δ‖² share", "enr.", "max")
    finite = np.nan_to_num(table["rel"], posinf=np.inf)
    for row in np.argsort(-finite, kind="stable")[:count].tolist():
        layer, matrix = table["layer"][row], table["matrix"][row]
        values = (_show_value(name, table[name][row]) for name in names)
        grid.add_row(
            str(layer) if layer >= 0 else "–", _plain(matrix), table["shape"][row], *values
        )
    console.print(grid)


def _table(title: str, *columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    text = ("", "component", "matrix", "shape")
    for name in columns:
        made.add_column(name, justify="left" if name in text else "right", no_wrap=name != "matrix")
    return made


def _plain(text: str) -> Any:
    """Keep rich from reading markup in names that come from a file."""
    from rich.text import Text

    return Text(text)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _show_value(name: str, value: float) -> str:
    if name.startswith(("share_", "unchanged_")):
        return f"{value:.1%}"
    return f"{value:.3g}"
