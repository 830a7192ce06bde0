"""figure2.py: what it trains and skips, its table against plain sums, and its picture."""

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from matplotlib.collections import LineCollection

import figure2
import train
from common.files import read_json
from data.settings import CLASSES_20, DataSettings
from learning import crossvalidation
from learning.options import resolve_architecture
from learning.run import AGRI, PUBLISHED_DAYS, Run
from models.architecture import Architecture, read_preset
from reports import figure2 as comparison
from reports.figure2 import (
    Row,
    all_configurations,
    is_sentinel_agri,
    measure_model,
    plot_comparison,
    published_curves,
)
from tests.commands import run_command
from tests.folders import write_folder, write_meta
from tests.test_plots import check_texts

SETTINGS = "--epochs 2 --kfold 3 --npixel 4 --batch_size 4 --num_workers 0 --device cpu"
TWO = "--only LTAE/9k GRU/15k"


def run(folder: Path, res_dir: Path, options: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    command = f"--dataset_folder {folder} --res_dir {res_dir} {SETTINGS} {options}"
    run_command(figure2.main, command, monkeypatch)
    return res_dir


def read_table(res_dir: Path) -> list[dict[str, str]]:
    with open(res_dir / "figure2.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("data") / "set", n_parcels=15)
    write_meta(folder, "info", {"simulated": True})
    return folder


@pytest.fixture(scope="module")
def results(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run(folder, tmp_path_factory.mktemp("run") / "figure", TWO, monkeypatch)


def test_table_holds_the_scores_of_the_runs(results: Path) -> None:
    rows = read_table(results)
    assert [row["configuration"] for row in rows] == ["LTAE/9k", "GRU/15k"]
    for row in rows:
        folder = results / row["configuration"]
        overall = json.loads((folder / "overall.json").read_text())
        tests = [json.loads((folder / f"Fold_{k}" / "test_metrics.json").read_text()) for k in (1, 2, 3)]
        assert float(row["OA"]) == pytest.approx(overall["Accuracy"], rel=1e-5)
        assert float(row["mIoU"]) == pytest.approx(overall["MACRO_IoU"], rel=1e-5)
        by_fold = [test["test_IoU"] for test in tests]
        assert float(row["mIoU_mean"]) == pytest.approx(np.mean(by_fold), rel=1e-5)
        assert float(row["mIoU_std"]) == pytest.approx(np.std(by_fold), rel=1e-5)
        assert float(row["OA_std"]) == pytest.approx(
            np.std([test["test_accuracy"] for test in tests]) / 100, rel=1e-5
        )
        assert int(row["parameters"]) == json.loads((folder / "conf.json").read_text())["N_params"]
        assert 0 < float(row["training_seconds"]) < 600
        assert (row["folds"], row["folds_tested"], row["epochs"], row["parcels"]) == ("3", "3", "2", "15")


def test_finished_runs_are_skipped_and_compared(
    results: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(train, "main", lambda: pytest.fail("trained again"))
    run(folder, results, TWO, monkeypatch)
    assert "LTAE/9k: finished" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        run(folder, results, f"{TWO} --epochs 3", monkeypatch)
    assert "epochs is 3 but was 2" in capsys.readouterr().err


def test_an_interrupted_run_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = [], crossvalidation.train_epoch

    def train_epoch(*args: object, **kwargs: object) -> object:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(crossvalidation, "train_epoch", train_epoch)
    with pytest.raises(SystemExit, match="130"):
        run(folder, tmp_path / "figure", "--only GRU/15k", monkeypatch)
    run_command(figure2.main, f"--res_dir {tmp_path / 'figure'} --draw", monkeypatch)
    assert read_table(tmp_path / "figure")[0]["folds_tested"] == "1"
    first = float(read_table(tmp_path / "figure")[0]["training_seconds"])
    calls.append(1)
    run(folder, tmp_path / "figure", "--only GRU/15k", monkeypatch)
    row = read_table(tmp_path / "figure")[0]
    assert len(calls) == 4 + 3  # 3 folds of 2 epochs, of which 3 were trained before
    assert row["folds_tested"] == "3" and float(row["training_seconds"]) > first


def test_a_claimed_run_is_left_to_its_process(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "LTAE" / "9k").mkdir(parents=True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with FileLock(tmp_path / "LTAE" / "9k" / ".claimed"):
        run(folder, tmp_path, TWO, monkeypatch)
    assert os.environ["WORLD_SIZE"] == "1"  # so that train.py does not wait for a peer
    assert "LTAE/9k: another process is at it" in capsys.readouterr().out
    assert [row["configuration"] for row in read_table(tmp_path)] == ["GRU/15k"]


def test_a_process_that_finds_nothing_to_do_ends_well(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "LTAE" / "9k").mkdir(parents=True)
    with FileLock(tmp_path / "LTAE" / "9k" / ".claimed"):
        run(folder, tmp_path, "--only LTAE/9k", monkeypatch)
    assert not (tmp_path / "figure2.csv").exists()  # the other one has not tested a fold yet


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--only LTAE/10k", "--only LTAE/10k is unknown"),
        ("--only LTAE --preset LTAE/9k", "--preset is set for each"),
        ("--only LTAE --preset=LTAE/9k", "--preset is set for each"),
        ("--only LTAE --epochz 3", "unrecognized arguments: --epochz"),
        ("--batch_size 1", "--batch_size is 1"),
        ("--draw", "holds no configuration with a tested fold"),
    ],
)
def test_wrong_input(
    options: str,
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(folder, tmp_path / "none", options, monkeypatch)
    assert message in capsys.readouterr().err


def test_names_choose_in_the_order_of_the_figure() -> None:
    assert figure2.choose(["TAE/19k", "LTAE"]) == [
        *(n for n in all_configurations() if n.startswith("LTAE")),
        "TAE/19k",
    ]
    assert len(figure2.choose(None)) == 26


def mlp_cost(widths: list[int]) -> int:
    return sum(2 * a * b for a, b in zip(widths[:-1], widths[1:]))


def plain_flops(config: dict, S: int) -> tuple[int, int]:
    """Matrix products of one parcel, written out from the papers' equations: temporal encoder, and all."""
    L, E, H, K = 24, config["mlp2"][-1], config["n_head"], config["d_k"]
    pse = L * (S * mlp_cost(config["mlp1"]) + mlp_cost(config["mlp2"]))
    if config["gru"]:
        temporal = L * 2 * 3 * config["hidden_dim"] * (E + config["hidden_dim"])
    elif config["tcnn"]:
        widths = [E, *config["nker"]]
        temporal = 3 * L * mlp_cost(widths) + mlp_cost([L * widths[-1], *config["mlp3"]])
    else:
        D = config["d_model"] or E
        temporal = (
            (2 * L * E * D if config["d_model"] else 0)
            + 2 * H * K * D
            + 2 * L * D * H
            + mlp_cost(config["mlp3"])
        )
        if config["tae"]:  # queries of the mean date, and heads that average all channels
            temporal += 2 * D * H * K + 2 * (H * K) ** 2 + 2 * L * H * D
    return temporal, pse + temporal + mlp_cost(config["mlp4"])


@pytest.mark.parametrize("name", ["LTAE/9k", "LTAE/740k", "TAE/19k", "TAE/195k", "GRU/134k", "TempCNN/3362k"])
def test_operations_are_those_of_the_equations(name: str) -> None:
    run = agri_run(architecture=resolve_architecture({}, read_preset(name), AGRI), npixel=7)
    _, flops = measure_model(run)
    assert flops == plain_flops(run.architecture.to_dict(), 7)


def test_published_curve_is_that_of_the_paper() -> None:
    scores = read_json(comparison.PUBLISHED)["mIoU"]
    assert [f"{a}/{s}" for a in scores for s in scores[a]] == all_configurations()
    counts, values = published_curves()["LTAE"]
    assert (counts[0], counts[-1]) == (8_832, 3_808_896)  # as in the README
    assert (values[0], values[2]) == (50.90, 51.72)


def agri_run(
    architecture: Architecture | None = None,
    date_positions: list[int] = PUBLISHED_DAYS,
    classes: tuple[int, ...] = CLASSES_20,
    simulated: bool = False,
    npixel: int = 64,
) -> Run:
    architecture = replace(architecture or resolve_architecture({}, {}, AGRI), date_positions=date_positions)
    data = DataSettings(classes=classes, npixel=npixel)
    return Run(Path("run"), data, architecture, about={"simulated": simulated})


def agri_row(**changes: object) -> Row:
    row = Row("LTAE/9k", 8832, 39956, 0.94, 0.001, 0.51, 0.52, 0.01, 1.0, 1, 2, 5, 5, 100, 191_703)
    return row._replace(**changes)


@pytest.mark.parametrize(
    ("row", "config", "expected"),
    [
        ({}, {}, True),
        ({"folds_tested": 2, "parcels": 76_681}, {}, True),
        ({"parcels": 2000}, {}, False),
        ({}, {"simulated": True}, False),
        ({}, {"date_positions": [*PUBLISHED_DAYS[:-1], 286]}, False),
        ({}, {"classes": CLASSES_20[:-1]}, False),
    ],
)
def test_sentinel_agri_is_told(row: dict, config: dict, expected: bool) -> None:
    assert is_sentinel_agri(agri_row(**row), agri_run(**config)) == expected


@pytest.mark.parametrize("with_published", [False, True])
def test_picture(with_published: bool) -> None:
    rows = [
        agri_row(),
        agri_row(
            configuration="LTAE/34k", parameters_temporal=33_920, mIoU=0.6, mIoU_mean=0.62, folds_tested=2
        ),
    ]
    axis = plot_comparison(rows, "what the runs are", with_published).axes[0]
    assert [text.get_text() for text in axis.texts] == ["what the runs are"]
    (band,) = (each for each in axis.collections if len(each.get_paths()))
    low, high = np.sort(np.unique(band.get_paths()[0].vertices[:, 1].round(6)))[[0, -1]]
    assert (low, high) == (51, 63)  # the means with the deviation over folds, 1 %
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert lines["L-TAE"].get_xdata().tolist() == [8832, 33920]
    assert lines["L-TAE"].get_ydata().tolist() == pytest.approx([51, 60])
    hollow = [
        line for line in axis.get_lines() if line.get_markerfacecolor() == "white" and len(line.get_xdata())
    ]
    assert [line.get_xdata().tolist() for line in hollow] == [[33920]]
    assert sum(line.get_linestyle() == "--" for line in axis.get_lines()) == (5 if with_published else 0)
    assert axis.get_xscale() == "log" and axis.get_title()


def test_one_configuration_alone_has_an_error_bar() -> None:
    axis = plot_comparison([agri_row(mIoU_std=0.02)], "", False).axes[0]
    bar = next(each for each in axis.collections if isinstance(each, LineCollection))
    np.testing.assert_allclose(
        bar.get_segments()[0], [[8832, 50], [8832, 54]]
    )  # around the mean of folds, 52


def test_texts_of_the_picture_fit() -> None:
    rows = [
        agri_row(configuration=name, parameters_temporal=9000 + 90_000 * i)
        for i, name in enumerate(all_configurations())
    ]
    about = comparison.describe_runs(rows, [agri_run()] * len(rows))
    axis = (figure := plot_comparison(rows, about, True)).axes[0]
    check_texts(figure, [axis.title, *axis.texts, axis.xaxis.label, axis.yaxis.label])


def test_title_says_that_data_are_simulated(results: Path) -> None:
    row, run = comparison.read_line(results, "LTAE/9k")
    assert comparison.describe_runs([row], [run]).startswith("simulated data")
    assert comparison.describe_runs(
        [row], [replace(run, about={**run.about, "simulated": False})]
    ).startswith("set (15 parcels), 3 folds, 2 epochs")
