"""Figures of one comparison, and its page."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from weightdiff.delta import Array
from weightdiff.naming import COMPONENTS, NO_LAYER
from weightdiff.page import Page
from weightdiff.plots import theme

if TYPE_CHECKING:
    from weightdiff.compare import Comparison

METRICS = {
    "rel": "relative change ‖Δ‖ / ‖W_a‖",
    "share_sq": "share of ‖Δ‖²",
    "enrichment": "enrichment: share of ‖Δ‖² / share of parameters",
    "rms": "root mean square of Δ",
    "max_abs": "largest |Δ|",
    "one_minus_cos": "1 − cos(W_a, W_b)",
    "unchanged_bits": "share of elements with equal bits",
    "unchanged_1e-5": "share of elements with |Δ| ≤ 1e-5",
    "unchanged_rel_1e-3": "share of elements with |Δ| ≤ 1e-3·max(|a|, |b|)",
}
"""What each metric is called on an axis."""

_ROW = 26  # pixels per row of a heat map
_ATTENTION = ("W_Q", "W_K", "W_V", "W_O")

_READING = """Δ is W_b − W_a in fp32 from the stored dtypes; every norm is a Frobenius norm. \
A group that holds as large a share of ‖Δ‖² as of the parameters has enrichment 1 and is nothing \
special. Shares are over distinct parameters: tied weights count once. Sparsity depends on the \
storage: bf16 makes updates smaller than about |w|/256 vanish."""


class ComparisonPlots:
    """The figures of a comparison; every method returns a plotly figure."""

    def __init__(self, comparison: "Comparison") -> None:
        self._comparison = comparison

    def heatmap(self, metric: str = "rel", by: str = "component") -> go.Figure:
        """Show a metric by layer × ``by`` ("component" or "matrix")."""
        columns, rows, z = self._grid(metric, by)
        made = theme.figure(f"{METRICS[metric]}, by layer", height=130 + _ROW * len(rows))
        made.add_trace(_heat(z, columns, rows, metric))
        return _grid_axes(made, "layer")

    def metric_menu(self, by: str = "matrix") -> go.Figure:
        """Show layer × ``by`` with a menu to choose the metric."""
        made = theme.figure(height=190 + _ROW * len(self._grid("rel", by)[1]))
        buttons = []
        for shown, metric in enumerate(METRICS):
            columns, rows, z = self._grid(metric, by)
            made.add_trace(_heat(z, columns, rows, metric).update(visible=shown == 0))
            visible = [other == metric for other in METRICS]
            buttons.append(
                {"label": METRICS[metric], "method": "update", "args": [{"visible": visible}]}
            )
        menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
        made.update_layout(updatemenus=[menu], margin_t=90)
        return _grid_axes(made, "layer")

    def components(self) -> go.Figure:
        """Show each component's share of ‖Δ‖² beside its share of the parameters."""
        table = self._comparison.summary_columns()
        names = table["component"].tolist()
        made = theme.figure("Where the change is, and where the parameters are", height=380)
        made.add_bar(
            x=names,
            y=table["share_sq"].tolist(),
            name="share of ‖Δ‖²",
            marker_color=[theme.COMPONENT_COLOURS[name] for name in names],
            text=[f"×{value:.2g}" for value in table["enrichment"]],
            textposition="outside",
            cliponaxis=False,
        )
        made.add_bar(
            x=names,
            y=table["share_numel"].tolist(),
            name="share of parameters",
            marker_color=theme.with_alpha(theme.GREY, 0.55),
        )
        made.update_yaxes(title_text="share", tickformat=".0%")
        return made.update_layout(showlegend=False, barmode="group", bargroupgap=0.05)

    def heads(self, metric: str = "rel") -> go.Figure:
        """Show a metric for every attention head: layer × head of W_Q, W_K, W_V, W_O.

        W_K and W_V are shown by key-value head where query heads share them.
        """
        units = self._comparison.columns("layer", "matrix", "unit", units=True)
        matrices = [name for name in _ATTENTION if name in set(units["matrix"].tolist())]
        layers = sorted(set(units["layer"].tolist()))
        made = make_subplots(1, max(len(matrices), 1), subplot_titles=matrices, shared_yaxes=True)
        for column, name in enumerate(matrices, start=1):
            chosen = units["matrix"] == name
            heads = sorted(set(units["unit"][chosen].tolist()))
            z = np.full((len(layers), len(heads)), np.nan)
            rows = [layers.index(layer) for layer in units["layer"][chosen].tolist()]
            z[rows, units["unit"][chosen]] = units[metric][chosen]
            made.add_trace(
                go.Heatmap(
                    z=_lists(z),
                    coloraxis="coloraxis",
                    hovertemplate=f"{name} layer %{{y}} head %{{x}}<br>{metric} %{{z:.4g}}"
                    "<extra></extra>",
                ),
                row=1,
                col=column,
            )
            made.update_xaxes(title_text="head", row=1, col=column)
        made.update_yaxes(title_text="layer", row=1, col=1)
        made.update_layout(
            template=theme.figure().layout.template,
            title_text=f"{METRICS[metric]}, by attention head",
            height=max(260, 150 + 18 * len(layers)),
            coloraxis={"colorscale": theme.SEQUENTIAL, "colorbar": {"title": {"text": metric}}},
        )
        return made

    def _grid(self, metric: str, by: str) -> tuple[list[str], list[str], Array]:
        """Lay a metric out as ``by`` × layer; what lies outside the blocks stands at the ends."""
        table = self._comparison.columns("layer", "component", by)
        layers = sorted(set(table["layer"].tolist()) - {NO_LAYER})
        places = [
            str(layer) if layer != NO_LAYER else "in" if component == "embed" else "out"
            for layer, component in zip(
                table["layer"].tolist(), table["component"].tolist(), strict=True
            )
        ]
        columns = [name for name in ("in", *map(str, layers), "out") if name in places]
        rows = list(dict.fromkeys(table[by].tolist()))
        if by == "component":
            rows.sort(key=COMPONENTS.index)
        z = np.full((len(rows), len(columns)), np.nan)
        for place, row, value in zip(places, table[by].tolist(), table[metric], strict=True):
            z[rows.index(row), columns.index(place)] = value
        return columns, rows, z


def page(comparison: "Comparison") -> Page:
    """Collect the tables and figures of a comparison on one page."""
    meta, total = comparison.meta, comparison.total
    lead = (
        f"{total['numel']:,} parameters changed by {total['rel']:.3g} of their norm; "
        f"{total['unchanged_bits']:.1%} of them kept their bits."
    )
    made = Page(f"{Path(meta['a']['path']).name} → {Path(meta['b']['path']).name}", lead)
    made.text(f"A is {meta['a']['path']}, B is {meta['b']['path']}.")
    for warning in meta["warnings"]:
        made.text(f"Note: {warning}.")
    made.section("Components", _READING)
    made.figure(
        comparison.plot.components(),
        alt="Share of the squared change and share of the parameters of each component",
        caption="Coloured: share of ‖Δ‖²; grey: share of the parameters; above: enrichment.",
    )
    made.table(comparison.summary(), formats=_formats(comparison.summary().columns))
    made.section("Layers")
    made.figure(comparison.plot.heatmap(), alt="Relative change by layer and component")
    made.figure(
        comparison.plot.metric_menu(),
        alt="Any metric by layer and matrix, chosen from a menu",
        caption="The menu at the top chooses the metric.",
    )
    if len(comparison.units):
        made.section("Heads")
        made.figure(comparison.plot.heads(), alt="Relative change of every attention head")
    made.section("Matrices")
    shown = ["layer", "matrix", "shape", "dtype_b", "rel", "rms", "max_abs", "one_minus_cos"]
    shown += ["share_sq", "enrichment", "unchanged_bits", "unchanged_1e-5", "flags"]
    made.table(comparison.tensors[shown], formats=_formats(shown))
    return made


def notebook_html(comparison: "Comparison") -> str:
    """Return the summary as a small table, with everything from the files escaped."""
    summary = comparison.summary()
    formats = {name: pattern.format for name, pattern in _formats(summary.columns).items()}
    notes = "".join(f"<li>{html.escape(w)}</li>" for w in comparison.meta["warnings"])
    return (
        f"<p><b>{html.escape(repr(comparison))}</b></p>"
        f"{summary.to_html(index=False, formatters=formats, border=0)}<ul>{notes}</ul>"
    )


def _formats(columns: Iterable[str]) -> dict[str, str]:
    shares = ("share_", "unchanged_")
    texts = ("layer", "component", "matrix", "shape", "dtype_b", "flags")
    patterns = {name: "{:.1%}" if name.startswith(shares) else "{:.3g}" for name in columns}
    patterns["numel"] = "{:,}"
    return {k: v for k, v in patterns.items() if k in columns and k not in texts}


def _heat(z: Array, columns: Sequence[str], rows: Sequence[str], metric: str) -> go.Heatmap:
    written = z.shape[1] <= 14
    return go.Heatmap(
        z=_lists(z),
        x=list(columns),
        y=list(rows),
        colorscale=theme.SEQUENTIAL,
        colorbar={"title": {"text": metric}},
        texttemplate="%{z:.2g}" if written else None,
        hovertemplate=f"layer %{{x}}, %{{y}}<br>{metric} %{{z:.4g}}<extra></extra>",
        hoverongaps=False,
        xgap=1,
        ygap=1,
    )


def _grid_axes(made: go.Figure, title: str) -> go.Figure:
    made.update_xaxes(title_text=title, type="category", showgrid=False)
    return made.update_yaxes(autorange="reversed", type="category", showgrid=False)


def _lists(z: Array) -> list[list[float | None]]:
    """Turn NaN and infinities into gaps; plain lists keep the figure's JSON readable."""
    return [[v if np.isfinite(v) else None for v in row] for row in z.tolist()]
