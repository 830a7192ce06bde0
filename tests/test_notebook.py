"""The notebook, from top to bottom, in a kernel of its own."""

import shutil
from pathlib import Path

import pytest

from preprocessing.simulate import simulate
from tests.commands import run_train
from tests.processes import PATIENCE

nbformat = pytest.importorskip("nbformat", reason="requirements-notebook.txt is not installed")
nbclient = pytest.importorskip("nbclient", reason="requirements-notebook.txt is not installed")
pytest.importorskip("ipykernel", reason="requirements-notebook.txt is not installed")

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "pretrained.ipynb"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A simulated dataset, and a run on it with the published architecture."""
    folder = tmp_path_factory.mktemp("data") / "simulated"
    simulate(folder, 100, seed=1, progress=False, max_pixels=8)
    with pytest.MonkeyPatch.context() as monkeypatch:
        results = tmp_path_factory.mktemp("run") / "res"
        return folder, run_train(folder, results, "--epochs 1 --batch_size 16", monkeypatch)


def execute(run: Path, folder: Path, place: Path) -> list:
    """Executes the notebook with another run and dataset, in some folder; returns its code cells."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    repository = ".." if place == NOTEBOOK.parent else str(NOTEBOOK.parent.parent)
    parameters.source = f"repository, run, dataset_folder = {repository!r}, {str(run)!r}, {str(folder)!r}"
    resources = {"metadata": {"path": str(place)}}
    nbclient.NotebookClient(notebook, timeout=PATIENCE, kernel_name="python3", resources=resources).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cells: list) -> int:
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)


def test_notebook_of_a_run_without_attention(
    run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MPLBACKEND", raising=False)
    results = run_train(run[0], tmp_path / "gru", "--gru --epochs 1 --batch_size 16", monkeypatch)
    assert pictures(execute(results, run[0], NOTEBOOK.parent)) == 3


@pytest.mark.parametrize("published", [False, True], ids=["run", "published weights"])
def test_notebook(
    published: bool, run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MPLBACKEND", raising=False)  # pictures go into the notebook
    folder, results = run
    if published:  # weights alone
        for path in results.glob("Fold_*"):
            (tmp_path / path.name).mkdir()
            shutil.copy(path / "model.pth.tar", tmp_path / path.name)
        results = tmp_path
    cells = execute(results, folder, tmp_path if published else NOTEBOOK.parent)  # also copied elsewhere
    text = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert "3 folds, 143," in text and "100 parcels, 24 dates, 10 channels, 20 classes" in text
    assert pictures(cells) == 3
    assert not any(
        output.output_type == "error" or output.get("name") == "stderr" for c in cells for output in c.outputs
    )


def test_notebook_is_kept_without_results() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
