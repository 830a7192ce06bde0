"""Without the packages of requirements-geo.txt, what needs them says so in one sentence; the rest works."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.folders import write_folder
from tests.processes import PATIENCE

ROOT = Path(__file__).resolve().parent.parent
GEO = ("rasterio", "geopandas", "pyogrio", "shapely", "pyproj", "pyarrow", "dask", "distributed")


def run_without(module: str, arguments: str) -> subprocess.CompletedProcess:
    code = (
        f"import runpy, sys; sys.modules |= dict.fromkeys({GEO}); sys.argv = ['', *{shlex.split(arguments)}]; "
        f"runpy.run_module('preprocessing.{module}', run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("prepare", "--images {0} --parcels {0}/parcels.gpkg --output {0}/new"),
        ("simulate", "{0}/new --rasters --parcels 5"),
        ("statistics", "{0}/folder"),
        ("split", "{0}/folder --blocks 1"),
        ("split", "{0}/folder --groups region"),
    ],
)
def test_one_sentence(tmp_path, module, arguments):
    (write_folder(tmp_path / "folder", extra_size=0) / "META" / "parcels.gpkg").touch()
    done = run_without(module, arguments.format(tmp_path))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ") and "requirements-geo.txt" in done.stderr
    assert not (tmp_path / "new").exists()


def test_statistics_need_none(tmp_path):
    folder = write_folder(tmp_path / "folder")
    done = run_without("statistics", str(folder))
    assert done.returncode == 0, done.stderr
    assert (folder / "normalisation_values.pkl").exists()


def test_groups_of_a_file_need_none(tmp_path):
    folder = write_folder(tmp_path / "folder")
    ids = [path.stem for path in (folder / "DATA").glob("*.npy")]
    groups = folder / "META" / "groups.json"
    groups.write_text(json.dumps({parcel: number % 4 for number, parcel in enumerate(ids)}))
    done = run_without("split", f"{folder} --groups {groups} --kfold 3")
    assert done.returncode == 0, done.stderr
    assert "No picture" in done.stdout and (folder / "META" / "folds.json").exists()
