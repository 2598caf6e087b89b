"""Measure what alignment changed in a model's weights, and how that relates to refusal.

>>> import weightdiff as wd
>>> comparison = wd.compare("runs/tiny/sft", "runs/tiny/dpo")
>>> comparison.plot.heatmap()

Names are resolved when first used, so that importing the package costs nothing.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightdiff.compare import Comparison, compare, load_comparison
    from weightdiff.direction import (
        Direction,
        load_direction,
        refusal_direction,
        select_direction,
    )
    from weightdiff.effects import Effects, causal_effects, project
    from weightdiff.errors import WeightdiffError
    from weightdiff.interval import cluster_bootstrap
    from weightdiff.intervene import generate
    from weightdiff.judge import Lexicon, judge
    from weightdiff.model import load_model
    from weightdiff.page import Page
    from weightdiff.prompts import Prompt, load_prompts
    from weightdiff.refusal import refusal

__version__ = "0.1.0"

_HOME = {
    "Comparison": "compare",
    "Direction": "direction",
    "Effects": "effects",
    "Lexicon": "judge",
    "Page": "page",
    "Prompt": "prompts",
    "WeightdiffError": "errors",
    "causal_effects": "effects",
    "cluster_bootstrap": "interval",
    "compare": "compare",
    "generate": "intervene",
    "judge": "judge",
    "load_comparison": "compare",
    "load_direction": "direction",
    "load_model": "model",
    "load_prompts": "prompts",
    "project": "effects",
    "refusal": "refusal",
    "refusal_direction": "direction",
    "select_direction": "direction",
}

__all__ = [
    "Comparison",
    "Direction",
    "Effects",
    "Lexicon",
    "Page",
    "Prompt",
    "WeightdiffError",
    "causal_effects",
    "cluster_bootstrap",
    "compare",
    "generate",
    "judge",
    "load_comparison",
    "load_direction",
    "load_model",
    "load_prompts",
    "project",
    "refusal",
    "refusal_direction",
    "select_direction",
]


class _Package(ModuleType):
    """A package whose public functions win over modules of the same name.

    Importing ``weightdiff.compare`` binds the module as an attribute here; without this,
    ``weightdiff.compare(a, b)`` would then call a module.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'weightdiff' has no attribute {name!r}")
        value = getattr(import_module(f"weightdiff.{_HOME[name]}"), name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted(__all__)


sys.modules[__name__].__class__ = _Package
