"""learning/results.py: the files of a results folder."""

import json
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from learning.results import (
    CONFIG,
    CONFUSION,
    NORMALISATION,
    OVERALL,
    PER_CLASS,
    fold_folder,
    load_normalisation,
    prepare_folder,
    read_confusion,
    remove_results,
    save_normalisation,
    save_overall,
    save_test,
)


def test_a_folder_is_made_and_left_without_traces(tmp_path: Path) -> None:
    folder = prepare_folder(tmp_path / "a" / "b", overwrite=False)
    assert folder.is_dir() and not any(folder.iterdir())


@pytest.mark.parametrize("what", ["conf", "fold"])
def test_results_are_only_touched_when_that_is_asked_for(tmp_path: Path, what: str) -> None:
    if what == "conf":
        (tmp_path / CONFIG).write_text("{}")
    else:
        fold_folder(tmp_path, 1)
    with pytest.raises(UserError) as error:
        prepare_folder(tmp_path, overwrite=False)
    assert "--resume" in str(error.value) and "--overwrite" in str(error.value)
    prepare_folder(tmp_path, overwrite=True)
    if what == "conf":
        prepare_folder(tmp_path, overwrite=False, resume=True)
    else:
        with pytest.raises(UserError, match=CONFIG):
            prepare_folder(tmp_path, overwrite=False, resume=True)


def test_removing_results_keeps_other_files(tmp_path: Path) -> None:
    for name in (CONFIG, OVERALL, PER_CLASS, "notes.txt"):
        (tmp_path / name).write_text("{}")
    (fold_folder(tmp_path, 7) / "file").write_text("")
    remove_results(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("extra", [None, (np.arange(4.0), np.arange(1.0, 5))])
def test_normalisation_survives(tmp_path: Path, extra: tuple | None) -> None:
    assert load_normalisation(tmp_path) == (None, None)
    norm = np.random.rand(5, 3), np.random.rand(5, 3) + 0.1
    save_normalisation(tmp_path, norm, extra)
    found, found_extra = load_normalisation(tmp_path)
    np.testing.assert_array_equal(found, norm)
    assert (found_extra is None) == (extra is None)
    if extra is not None:
        np.testing.assert_array_equal(found_extra, extra)


def test_a_deviation_of_zero_is_damage(tmp_path: Path) -> None:
    np.savez(tmp_path / NORMALISATION, mean=np.zeros(3), std=np.array([1, 0, 1.0]))
    with pytest.raises(UserError, match=NORMALISATION):
        load_normalisation(tmp_path)


def test_overall_is_that_of_the_summed_matrix(tmp_path: Path) -> None:
    matrices = [np.array([[3, 1], [0, 2]]), np.array([[1, 0], [4, 5]])]
    for fold, mat in enumerate(matrices, start=1):
        save_test(fold_folder(tmp_path, fold), {"test_accuracy": 1.0}, mat)
        np.testing.assert_array_equal(read_confusion(tmp_path / f"Fold_{fold}" / CONFUSION), mat)
    total, overall = save_overall(tmp_path, 2)
    assert total.tolist() == [[4, 1], [4, 7]]
    assert overall["Accuracy"] == pytest.approx(11 / 16)
    assert overall["MACRO_IoU"] == pytest.approx((4 / 9 + 7 / 12) / 2)
    assert json.loads((tmp_path / OVERALL).read_text())["Accuracy"] == pytest.approx(11 / 16)
    assert set(json.loads((tmp_path / PER_CLASS).read_text())) == {"0", "1"}


def test_matrices_of_unequal_size_are_refused(tmp_path: Path) -> None:
    for fold, n in ((1, 2), (2, 3)):
        save_test(fold_folder(tmp_path, fold), {}, np.eye(n, dtype=int))
    with pytest.raises(UserError, match="unequal size"):
        save_overall(tmp_path, 2)
