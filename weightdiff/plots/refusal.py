"""Figures of one refusal analysis, and its page."""

from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from weightdiff.page import Page
from weightdiff.plots import theme

if TYPE_CHECKING:
    import pandas as pd

    from weightdiff.refusal import Refusal

_PANELS = (
    (("ablation", "affine"), "refusal log-odds, harmful, ablated"),
    (("addition", "addition_last"), "refusal log-odds, harmless, added"),
    (("kl", "affine_kl"), "KL on harmless, ablated (nats)"),
)
_DASHES = ("solid", "dot")
_NAMES = {
    "none": "none",
    "zero": "zero-<br>ablation",
    "affine": "affine<br>ablation",
    "addition": "addition",
}

_READING = """A direction mediates refusal if removing it makes the model answer harmful requests, \
adding it makes the model refuse harmless ones, and random directions of the same length do \
neither. Zero-ablation takes the component along the direction out; affine ablation sets it to \
what it is on harmless prompts at the same place, since zero is not the harmless mean. Answers are \
generated and judged as text; refusal and compliance are separate verdicts, and an answer can be \
neither. Bars are 95 % intervals, over clusters of prompts where the prompts name theirs."""


class RefusalPlots:
    """The figures of a refusal analysis; every method returns a plotly figure."""

    def __init__(self, result: "Refusal") -> None:
        self._result = result

    def candidates(self) -> go.Figure:
        """Show every candidate's scores by layer, a colour for each position."""
        return candidates(self._result.candidates, self._result.direction.info)

    def effects(self, rule: str = "affine") -> go.Figure:
        """Show refusal and compliance under each intervention, with random directions in grey."""
        table = self._result.effects.table
        return effects(table[table["rule"] == rule])


def candidates(table: "pd.DataFrame", info: Any = None) -> go.Figure:
    """Draw the scores of `Direction.candidates`: zero-ablation and addition everywhere solid."""
    made = make_subplots(1, len(_PANELS), subplot_titles=[title for _, title in _PANELS])
    made.update_layout(theme.figure(height=380).layout)
    tokens = (info or {}).get("position_tokens", {})
    for colour, (pos, rows) in zip(theme.COLOURS, table.groupby("pos"), strict=False):
        label = f"{pos} {tokens.get(str(pos), '')}".strip()
        for column, (scores, _) in enumerate(_PANELS, 1):
            for dash, score in zip(_DASHES, scores, strict=True):
                made.add_scatter(
                    row=1,
                    col=column,
                    x=rows["layer"].tolist(),
                    y=rows[score].tolist(),
                    mode="lines+markers",
                    name=label,
                    legendgroup=label,
                    showlegend=column == 1 and dash == "solid",
                    line={"color": colour, "dash": dash},
                    hovertemplate=f"{score}, {label}, layer %{{x}}: %{{y:.3g}}<extra></extra>",
                )
    made.add_hline(y=0.1, row=1, col=3, line={"color": theme.MUTED, "width": 1, "dash": "dash"})
    made.update_xaxes(title_text="layer (resid_pre)", dtick=max(1, int(table["layer"].max()) // 8))
    made.update_annotations(font_size=12)
    made.update_layout(
        legend={"y": -0.28, "yanchor": "top", "title": {"text": "position"}}, margin_b=90
    )
    return made


def effects(table: "pd.DataFrame") -> go.Figure:
    """Draw rates with their intervals from the table of `causal_effects`."""
    titles = ("harmful prompts", "harmless prompts")
    made = make_subplots(1, 2, subplot_titles=titles, shared_yaxes=True)
    made.update_layout(theme.figure(height=400).layout, barmode="group", scattermode="group")
    colours = {"refusal": theme.VERMILION, "compliance": theme.BLUE}
    for column, prompts in enumerate(("harmful", "harmless"), 1):
        rows = table[table["prompts"] == prompts]
        real, random = rows[rows["control"] == ""], rows[rows["control"] != ""]
        names = [_NAMES[name] for name in real["intervention"]]
        for verdict, colour in colours.items():
            rates = real[f"{verdict}_rate"]
            made.add_bar(
                row=1,
                col=column,
                x=names,
                y=rates.tolist(),
                name=verdict,
                marker_color=colour,
                offsetgroup=verdict,
                showlegend=column == 1,
                error_y={
                    "type": "data",
                    "array": (real[f"{verdict}_high"] - rates).tolist(),
                    "arrayminus": (rates - real[f"{verdict}_low"]).tolist(),
                    "thickness": 1.5,
                    "width": 3,
                },
                hovertemplate=f"%{{x}}: %{{y:.1%}} {verdict}<extra></extra>",
            )
            if len(random):
                made.add_scatter(
                    row=1,
                    col=column,
                    x=[_NAMES[name] for name in random["intervention"]],
                    y=random[f"{verdict}_rate"].tolist(),
                    mode="markers",
                    name=f"{verdict}, random direction",
                    offsetgroup=verdict,
                    cliponaxis=False,
                    marker={
                        "color": "white",
                        "symbol": "diamond",
                        "size": 9,
                        "line": {"color": colour, "width": 2},
                    },
                    showlegend=column == 1,
                )
    made.update_yaxes(range=[0, 1.03], tickformat=".0%")
    made.update_layout(legend={"y": -0.2, "yanchor": "top"}, margin_b=90)
    return made


def refusal_page(result: "Refusal") -> Page:
    """Lay out the analysis: choice, candidates, effects, answers side by side."""
    from weightdiff.refusal import RULES, describe

    direction = result.direction
    page = Page(f"Refusal direction of {direction.info.get('model', '')}", describe(direction))
    page.section("What it causes", _READING)
    page.figure(
        result.plot.effects(),
        alt="Refusal and compliance rates under each intervention, with 95 % intervals.",
        caption="Diamonds: random directions of equal length.",
    )
    page.table(result.rates(), formats=dict.fromkeys(_RATES, "{:.1%}") | _NUMBERS)
    page.section("How it was chosen")
    for rule in RULES:
        page.text(f"{rule}: {describe(direction.by(rule))}.")
    page.figure(
        result.plot.candidates(),
        alt="Scores of every candidate by layer and position.",
        caption="Solid: zero-ablation, addition at all positions. Dotted: affine ablation, "
        "addition at the last prompt token alone. Dashed: the gate of the KL.",
    )
    page.table(result.candidates, formats=dict.fromkeys(_scores(result.candidates), "{:.3g}"))
    page.section("Answers to the same prompts")
    return page.table(side_by_side(result.effects.completions))


_RATES = ("refusal_rate", "compliance_rate", "random_refusal", "random_compliance")
_NUMBERS = {"log_odds": "{:.2f}", "kl": "{:.3f}"}


def _scores(table: "pd.DataFrame") -> list[str]:
    return list(table.select_dtypes("floating").columns)


def side_by_side(completions: "pd.DataFrame", count: int = 12) -> "pd.DataFrame":
    """Put the answers under each intervention beside each other, ``count`` prompts of each kind."""
    real = completions[(completions["control"] == "") & (completions["rule"] == "affine")]
    first = real.groupby(["prompts", "intervention"], sort=False).head(count)
    wide = first.pivot_table(
        index=["prompts", "prompt"],
        columns="intervention",
        values="response",
        aggfunc="first",
        sort=False,
    )
    return wide.reset_index().rename_axis(columns=None)
