"""``weightdiff refusal``: a checkpoint and prompts in, a direction and its proof out."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

    from weightdiff.refusal import Refusal

_FILE = click.Path(path_type=Path)


@click.command()
@click.argument("ckpt")
@click.option("--harmful", type=_FILE, required=True, help="Prompts that should be refused.")
@click.option("--harmless", type=_FILE, required=True, help="Prompts that should be answered.")
@click.option("--harmful-val", type=_FILE, help="To choose by; else split off from --harmful.")
@click.option("--harmless-val", type=_FILE, help="Likewise.")
@click.option("--harmful-test", type=_FILE, help="To test on; else split off from --harmful.")
@click.option("--harmless-test", type=_FILE, help="Likewise.")
@click.option(
    "--out",
    type=_FILE,
    help="Write direction.safetensors, direction.json, candidates.parquet, effects.parquet, "
    "completions.jsonl and refusal.html to this directory.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
@click.option(
    "--lexicon",
    default="english",
    show_default=True,
    metavar="NAME|FILE",
    help="english, arditi, or a JSON file with refusal_tokens, refusal_phrases, "
    "objection_phrases and compliance_phrases.",
)
@click.option(
    "--positions",
    type=click.Choice(["all", "post"]),
    default="all",
    show_default=True,
    help="Where ablation acts: all tokens, or those after the instruction.",
)
@click.option("--alpha", default=1.0, show_default=True, help="Factor of the addition.")
@click.option(
    "--random",
    "n_random",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Random directions as controls.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Per answer.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Of the tested answers; 0 is greedy.",
)
@click.option("--chat-template", type=_FILE, help="Jinja file in place of the tokenizer's own.")
@click.option("--plain", is_flag=True, help="Use prompts as they are, without a chat template.")
@click.option("--eps-compat", is_flag=True, help="Use the epsilons of Arditi et al.'s code.")
@click.option("--device", help="cpu, cuda, cuda:1; default cpu.")
@click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16, …")
@click.option("--seed", default=0, show_default=True)
@click.option("--trust-remote-code", is_flag=True, help="Run Python code from the checkpoint.")
def refusal(
    ckpt: str,
    harmful: Path,
    harmless: Path,
    harmful_val: Path | None,
    harmless_val: Path | None,
    harmful_test: Path | None,
    harmless_test: Path | None,
    out: Path | None,
    as_json: bool,
    lexicon: str,
    positions: str,
    alpha: float,
    n_random: int,
    max_new_tokens: int,
    temperature: float,
    chat_template: Path | None,
    plain: bool,
    eps_compat: bool,
    device: str | None,
    dtype: str,
    seed: int,
    trust_remote_code: bool,
) -> None:
    """Find the direction that mediates refusal in CKPT, and what it causes on held-out prompts.

    CKPT is a local directory or a hub id. Prompts come from JSON, JSON lines (prompt, and cluster
    for prompts that are not independent) or text files. Mean differences of the residual stream
    at the tokens after the instruction are the candidates; a direction is chosen by the rule of
    Arditi et al. 2024 and by affine ablation. Without --out nothing is written.
    """
    from weightdiff.artefact import dump_json, output_dir
    from weightdiff.judge import Lexicon
    from weightdiff.prompts import load_prompts

    if out is not None:
        out = output_dir(out)
    # Read every small file before the model: a typo should not cost a minute.
    words = Lexicon.load(lexicon)
    files = (harmful, harmless, harmful_val, harmless_val, harmful_test, harmless_test)
    prompts = [None if path is None else load_prompts(path) for path in files]
    template = None if chat_template is None else _read(chat_template)
    from weightdiff.model import load_model
    from weightdiff.refusal import refusal as analyse

    model = load_model(
        ckpt,
        device=device,
        dtype=dtype,
        chat_template=template,
        plain=plain,
        trust_remote_code=trust_remote_code,
    )
    result = analyse(
        model,
        prompts[0] or [],
        prompts[1] or [],
        harmful_val=prompts[2],
        harmless_val=prompts[3],
        harmful_test=prompts[4],
        harmless_test=prompts[5],
        lexicon=words,
        positions="all" if positions == "all" else "post",
        alpha=alpha,
        n_random=n_random,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        eps_compat=eps_compat,
        seed=seed,
    )
    if as_json:
        click.echo(dump_json(result.as_json()))
    else:
        _show(result)
    if out is not None:
        result.save(out)
        click.echo(f"written to {out / 'refusal.html'}", err=True)


def _read(path: Path) -> str:
    from weightdiff.errors import WeightdiffError

    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise WeightdiffError(f"cannot read the chat template {path}: {error.strerror}") from error


def _show(result: "Refusal") -> None:
    from rich.console import Console
    from rich.text import Text

    from weightdiff.refusal import RULES, describe

    console = Console(highlight=False)
    direction = result.direction
    console.print(Text(f"Refusal direction of {direction.info['model']}"))
    for rule in RULES:
        console.print(Text(f"  {describe(direction.by(rule))}"))
    console.print()
    _show_effects(console, result)
    _show_candidates(console, result)


def _show_effects(console: "Console", result: "Refusal") -> None:
    from rich import box
    from rich.table import Table

    grid = Table(
        title="effects (affine pick)",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    heads = ("prompts", "with", "refuses", "95 %", "complies", "95 %", "random", "log-odds", "KL")
    for i, head in enumerate(heads):
        grid.add_column(head, justify="left" if i < 2 else "right", no_wrap=True)
    table = result.effects.table
    chosen = table[(table["rule"] == "affine") & (table["control"] == "")]
    random = result.rates().set_index(["intervention", "prompts"])["random_refusal"]
    for row in chosen.to_dict("records"):
        control = random[(row["intervention"], row["prompts"])]
        cells = [row["prompts"], row["intervention"]]
        for verdict in ("refusal", "compliance"):
            low, high = row[f"{verdict}_low"], row[f"{verdict}_high"]
            cells += [f"{row[f'{verdict}_rate']:.0%}", f"{100 * low:.0f}–{100 * high:.0f}"]
        cells += ["" if control != control else f"{control:.0%}"]
        grid.add_row(*cells, f"{row['log_odds']:.2f}", f"{row['kl']:.2f}")
    console.print(grid)
    console.print("random: refusal with random directions of equal length, mean of the draws\n")


def _show_candidates(console: "Console", result: "Refusal", count: int = 8) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    ranked = result.direction.select("affine").candidates.head(count)
    grid = Table(
        title="candidates, best first",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    heads = ("pos", "layer", "zero", "affine", "added", "KL", "discarded by the affine rule")
    for i, head in enumerate(heads):
        grid.add_column(head, justify="left" if i == 6 else "right", no_wrap=i < 6)
    for row in ranked.to_dict("records"):
        scores = (f"{row[c]:.2f}" for c in ("ablation", "affine", "addition", "affine_kl"))
        grid.add_row(str(row["pos"]), str(row["layer"]), *scores, Text(row["discarded"]))
    console.print(grid)
    console.print("zero, affine, added: log-odds of refusal at the first token of the answer")
