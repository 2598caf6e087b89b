import json
import os
from pathlib import Path

import numpy as np
import pytest

from weightdiff.artefact import atomic_path, dump_json, output_dir, write_json, write_text
from weightdiff.errors import WeightdiffError


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    final = tmp_path / "table.csv"
    write_text(final, "old")
    with pytest.raises(ZeroDivisionError), atomic_path(final) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert final.read_text() == "old"
    assert os.listdir(tmp_path) == ["table.csv"]


def test_json_is_strict_and_takes_numpy(tmp_path: Path) -> None:
    value = {"a": np.float64(0.5), "b": [float("nan"), np.inf], "c": np.arange(2), "d": tmp_path}
    write_json(tmp_path / "x.json", value)
    read = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert read == {"a": 0.5, "b": [None, None], "c": [0, 1], "d": str(tmp_path)}
    assert dump_json({"ü": 1}) == '{\n "ü": 1\n}'


def test_an_output_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightdiffError, match="cannot write to the output directory .*file"):
        output_dir(tmp_path / "file")


def test_a_disk_error_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(WeightdiffError, match="cannot write .*missing/x.json"):
        write_json(tmp_path / "missing" / "x.json", {})
