"""The report of a training run: one page, report.html, that needs no other file and no network.

    python -m reports.report RES_DIR

makes it from the files of a results folder, finished or not; training makes it at its end.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from common.errors import UserError, run_cli
from common.files import read_json, write_bytes
from common.flags import Parser
from learning.calibration import CALIBRATION
from learning.metrics import confusion_matrix_analysis
from learning.results import TEST_METRICS, TRAINLOG, read_confusions
from learning.run import Run, read_run
from models.weights import folds_with
from reports.plots import SCORES, plot_calibration, plot_confusion, plot_training, to_svg

REPORT, TEMPLATE = "report.html", "report_template.html"
_ELSEWHERE = ("command", "class_names", "notes")  # in conf.json, with places of their own on the page


def write_report(res_dir: str | Path) -> Path:
    """Writes report.html of a results folder, from its other files alone; returns its path.

    Raises:
        UserError: if the folder holds no run, or one of its files is damaged.
    """
    res_dir = Path(res_dir)
    run = read_run(res_dir)
    labels = [str(label) for label in run.data.classes]
    names = [str(run.class_names.get(label, "")) for label in labels]
    matrices = read_confusions(res_dir, len(labels))
    confusion = sum(matrices.values(), np.zeros((len(labels), len(labels)), np.int64))
    logs = {fold: log for fold, log in _read_folds(res_dir, TRAINLOG).items() if log}
    curves = _draw_curves(logs)
    tests = _read_folds(res_dir, TEST_METRICS)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(TEMPLATE).render(
        title=run.architecture.kind.title,
        config={name: value for name, value in run.about.items() if name not in _ELSEWHERE},
        dataset=Path(run.about.get("dataset_folder") or "").name,
        command=run.about.get("command"),
        simulated=run.about.get("simulated"),
        figures=_key_figures(run, confusion, tests),
        notes=[
            *run.about.get("notes", []),
            *_describe_tests(matrices, labels, names),
            *_describe_validation({} if run.training.averaged_epochs else logs),
        ],
        curves=[to_svg(figure) for figure in curves],
        tests=tests,
        classes=_describe_classes(confusion, labels, names),
        matrix=to_svg(plot_confusion(confusion, labels, "", run.class_names)) if matrices else None,
        calibration=_calibrate(_read_folds(res_dir, CALIBRATION)),
    )
    write_bytes(res_dir / REPORT, page.encode(errors="replace"))  # paths may be of another encoding
    return res_dir / REPORT


def _read_folds(res_dir: Path, name: str) -> dict[int, dict[str, Any]]:
    """The JSON files of that name, by fold, of the folds that have one."""
    found = {}
    for fold, path in folds_with(res_dir, name).items():
        found[fold] = read_json(path, "the file that train.py wrote")
        if not isinstance(found[fold], dict):
            raise UserError(f"{path} is something else; expected the file that train.py wrote.")
    return found


def _draw_curves(logs: dict[int, dict[str, Any]]) -> list[Figure]:
    """Scores by epoch, the one that chooses the best epoch first; none before the first epoch is done."""
    try:
        return [plot_training(logs, [key]) for key in reversed(SCORES)] if logs else []
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{TRAINLOG} of a fold is damaged ({error}); copy it again from the training."
        ) from error


def _key_figures(run: Run, confusion: np.ndarray, tests: dict[int, Any]) -> list[tuple[str, str, str]]:
    """What the page begins with: name, value and a remark each."""
    asked = run.training.kfold
    progress = f"{len(tests)} of {asked} folds tested" if asked != len(tests) else f"{len(tests)} folds"
    figures = []
    if confusion.sum():
        _, overall = confusion_matrix_analysis(confusion)
        figures += [
            ("Accuracy", f"{100 * overall['Accuracy']:.1f} %", _spread(tests, "test_accuracy", 1)),
            ("mIoU", f"{overall['MACRO_IoU']:.3f}", _spread(tests, "test_IoU", 3)),
            ("Mean F1-score", f"{overall['MACRO_F1-score']:.3f}", "mean over classes"),
        ]
    figures.append(("Test parcels", f"{confusion.sum():,}", progress))
    if isinstance(run.about.get("N_params"), int):
        figures.append(("Parameters", f"{run.about['N_params']:,}", "trainable"))
    return figures


def _spread(tests: dict[int, Any], key: str, digits: int) -> str:
    """Mean and standard deviation over folds."""
    values = [test[key] for test in tests.values() if isinstance(test.get(key), (int, float))]
    return f"folds: {np.mean(values):.{digits}f} \u00b1 {np.std(values):.{digits}f}" if values else ""


def _describe_tests(matrices: dict[int, np.ndarray], labels: list[str], names: list[str]) -> Iterator[str]:
    """Lines on classes without a parcel in the test of all folds or of one."""
    tested = np.array([mat.sum(1) for mat in matrices.values()]).reshape(-1, len(labels))
    titles = np.array([name or f"class {label}" for label, name in zip(labels, names)])
    every = tested.any(0)
    if len(tested) and not every.all():
        yield f"No tested parcel at all: {', '.join(titles[~every])}."
    lacking = {fold: titles[every & (row == 0)] for fold, row in zip(matrices, tested)}
    words = [f"fold {fold}: {', '.join(missing)}" for fold, missing in lacking.items() if len(missing)]
    if words:
        yield f"No test parcel in {'; '.join(words)}."


def _describe_validation(logs: dict[int, dict[str, Any]]) -> Iterator[str]:
    """A line on each fold whose validation has nothing left to choose the best epoch by."""
    for fold, log in logs.items():
        perfect = [epoch for epoch, scores in log.items() if scores["val_IoU"] == 1]
        if perfect:
            yield f"Fold {fold} reaches a validation mIoU of 1 in epoch {perfect[0]}; no later epoch can be told to be better."


def _describe_classes(confusion: np.ndarray, labels: list[str], names: list[str]) -> list[dict[str, Any]]:
    """Per class: label, name, number of test parcels, scores (None where undefined), and what it is most taken for."""
    per_class, _ = confusion_matrix_analysis(confusion)
    rows = []
    for k, (label, name) in enumerate(zip(labels, names)):
        wrong = np.where(np.arange(len(labels)) == k, 0, confusion[k])
        other = int(wrong.argmax())
        share = wrong[other] / max(confusion[k].sum(), 1)
        scores = {key: None if np.isnan(value) else value for key, value in per_class[str(k)].items()}
        taken_for = f"{names[other] or labels[other]} ({share:.1%})" if share else ""
        row = {"label": label, "name": name, "parcels": int(confusion[k].sum())}
        rows.append(row | {"scores": scores, "taken_for": taken_for})
    return rows


def _calibrate(folds: dict[int, dict[str, Any]]) -> dict[str, Any] | None:
    """The calibration curves of all folds together and their figures; None before the first is tested."""
    if not folds:
        return None
    stages = {"as predicted": list(folds.values())}
    if all(fold.get("calibrated") for fold in folds.values()):
        stages["calibrated"] = [fold["calibrated"] for fold in folds.values()]
    names = ("count", "confidence", "right")
    try:
        curves = {
            stage: np.sum([[part[name] for name in names] for part in parts], axis=0, dtype=float)
            for stage, parts in stages.items()
        }
        chart = to_svg(plot_calibration(np.array(next(iter(folds.values()))["edges"], dtype=float), curves))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"{CALIBRATION} of a fold is damaged ({error}); copy it again from the training."
        ) from error
    figures = {
        stage: (calibration_error(*curve), *(curve[1:].sum(1) / curve[0].sum()))
        for stage, curve in curves.items()
    }
    return {"chart": chart, "figures": figures}


def calibration_error(count: np.ndarray, confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error: mean over parcels of the gap between confidence and share right, 0 to 1."""
    return float(np.abs(confidence - right).sum() / count.sum())


def main() -> None:
    """Command line: python -m reports.report RES_DIR."""
    parser = Parser(description="Makes report.html of a results folder.")
    parser.add_argument("res_dir", metavar="RES_DIR", help="results folder of train.py")
    print(f"Report: {write_report(parser.parse_args().res_dir)}")


if __name__ == "__main__":
    run_cli(main)
