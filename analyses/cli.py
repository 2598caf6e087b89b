"""The commands that run the whole path, and the one that writes the report again."""

from pathlib import Path

import click


@click.command()
@click.argument("config", default="tiny", metavar="[CONFIG]")
@click.option("--out", type=click.Path(path_type=Path), help="Run directory [runs/NAME].")
@click.option("--seed", type=click.IntRange(min=0), help="Redraw everything from this seed.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="ppo.lr=1e-4, say.")
def pipeline(config: str, out: Path | None, seed: int | None, overrides: tuple[str, ...]) -> None:
    """Train base, SFT, reward model, PPO and DPO; analyse them; write the report.

    CONFIG is a preset (tiny) or a TOML file. What is finished is not run again: after an
    interruption the same command goes on. The result is RUN/report.html and RUN/summary.json.
    """
    from analyses.pipeline import run_pipeline
    from training.config import load_config

    seeds = [] if seed is None else [f"seed={seed}"]
    resolved = load_config(config, [*overrides, *seeds])
    report = run_pipeline(resolved, out or Path("runs") / resolved.name)
    click.echo(report)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Analyse the run directory RUN where that is still to be done, and write its report."""
    from analyses.pipeline import analyse

    click.echo(analyse(run))
