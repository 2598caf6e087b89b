import pytest

from analyses.seeds import Expectation, control_shift, markdown, table


def test_a_bound_is_kept_from_its_own_side() -> None:
    assert Expectation("x", lambda _: 0.0, 0.9).holds(0.9)
    assert not Expectation("x", lambda _: 0.0, 0.9).holds(0.89)
    assert Expectation("x", lambda _: 0.0, 0.1, at_least=False).holds(0.1)
    assert not Expectation("x", lambda _: 0.0, 0.1, at_least=False).holds(0.11)


def test_the_control_that_moves_most_counts() -> None:
    def row(intervention: str, prompts: str, control: str, rate: float) -> dict[str, object]:
        return {
            "rule": "affine",
            "intervention": intervention,
            "prompts": prompts,
            "control": control,
            "refusal_rate": rate,
        }

    rows = [
        row("none", "harmful", "", 0.9),
        row("none", "harmless", "", 0.1),
        row("zero", "harmful", "", 0.0),
        row("zero", "harmful", "random", 0.8),
        row("addition", "harmless", "random", 0.4),
    ]
    summary = {"checkpoints": {"ppo": {"direction": {"causal": rows}}}}
    assert control_shift("ppo")(summary) == pytest.approx(0.3)


def test_markdown_shows_rates_in_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "analyses.seeds.EXPECTATIONS", [Expectation("works", lambda s: s["rate"], 0.5)]
    )
    shown = markdown(table({0: {"rate": 0.75}, 1: {"rate": 0.25}}))
    assert shown.splitlines()[-1] == "| works | ≥ 50% | 75.0% | 25.0% | 1 of 2 |"
