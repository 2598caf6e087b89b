"""`weightdiff train`: from a config to a run directory."""

from pathlib import Path

import click

# No import of training.config here: `--help` must not wait for torch.
STAGES = ("base", "sft", "rm", "ppo", "dpo")


@click.command()
@click.argument("config", default="tiny")
@click.option("--out", type=click.Path(path_type=Path), help="Run directory  [default: runs/NAME].")
@click.option("--seed", type=click.IntRange(min=0), help="Redraw everything from this seed.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting.")
@click.option("--until", type=click.Choice(STAGES), default="dpo", help="Last stage to train.")
def train(
    config: str, out: Path | None, seed: int | None, overrides: tuple[str, ...], until: str
) -> None:
    """Train base, SFT, reward model, PPO and DPO.

    CONFIG is a preset (tiny, smoke) or a TOML file. Finished stages are kept, so the same command
    goes on where it stopped.
    """
    from training.config import load_config
    from training.run import train_all

    if seed is not None:
        overrides = (*overrides, f"seed={seed}")
    resolved = load_config(config, overrides)
    run = train_all(resolved, out or Path("runs") / resolved.name, until)
    click.echo(run.path)
