"""What every test may ask for."""

import os
from pathlib import Path

import pytest

# One thread a process: pytest workers share the cores, and tiny matrices gain nothing from more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Checkpoints, prompts and preferences that nobody here wrote."""
    root = Path(__file__).resolve().parents[1]
    path = Path(os.environ.get("WEIGHTDIFF_REAL_DATA", root.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; set WEIGHTDIFF_REAL_DATA")
    return path
