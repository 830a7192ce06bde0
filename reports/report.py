"""The report of a training run: one page, report.html, that needs no other file and no network.

    python -m reports.report RES_DIR

makes it from the files of a results folder, finished or not; training makes it at its end.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.arrays import load_arrays
from common.errors import UserError, run_cli
from common.files import read_json, write_bytes
from common.flags import Parser
from learning.calibration import CALIBRATION
from learning.metrics import confusion_matrix_analysis
from learning.results import CONFIG, CONFUSION, TEST_METRICS, TRAINLOG
from models.architecture import chosen_encoder, known_encoders
from reports import charts

REPORT, TEMPLATE = "report.html", "report_template.html"
_CURVES = {"IoU": "mIoU", "loss": "loss", "accuracy": "accuracy (%)"}


def write_report(res_dir: str | Path) -> Path:
    """Writes report.html of a results folder, from its other files alone; returns its path.

    Raises:
        UserError: if the folder holds no run, or one of its files is damaged.
    """
    res_dir = Path(res_dir)
    config = _read_dict(res_dir / CONFIG)
    if not isinstance(config.get("sub_classes"), list):
        raise UserError(
            f"{res_dir / CONFIG} has no list 'sub_classes'; expected the file that train.py wrote."
        )
    labels = [str(label) for label in config["sub_classes"]]
    given = config.get("class_names")
    names = [str(given.get(label, "")) for label in labels] if isinstance(given, dict) else [""] * len(labels)
    folds = sorted(
        (path for path in res_dir.glob("Fold_*") if re.fullmatch(r"Fold_\d+", path.name)),
        key=lambda path: int(path.name[5:]),
    )
    logs = [_read_dict(path) for path in _existing(folds, TRAINLOG)]
    curves = _draw_curves([log for log in logs if log])
    tests = {path.parent.name[5:]: _read_dict(path) for path in _existing(folds, TEST_METRICS)}
    confusion = _sum_confusion(_existing(folds, CONFUSION), len(labels))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(TEMPLATE).render(
        title=known_encoders()[chosen_encoder(config)].title,
        config={name: value for name, value in config.items() if name not in ("command", "class_names")},
        command=config.get("command"),
        figures=_key_figures(config, confusion, tests),
        curves=curves,
        tests=tests,
        classes=_describe_classes(confusion, labels, names),
        confusion=confusion.tolist(),
        calibration=_calibrate(_existing(folds, CALIBRATION)),
        sizes=charts,
    )
    write_bytes(res_dir / REPORT, page.encode())
    return res_dir / REPORT


def _existing(folds: list[Path], name: str) -> list[Path]:
    """The files of that name in the folds that have one."""
    return [fold / name for fold in folds if (fold / name).exists()]


def _read_dict(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    content = read_json(path, "the file that train.py wrote")
    if not isinstance(content, dict):
        raise UserError(f"{path} is something else; expected the file that train.py wrote.")
    return content


def _draw_curves(logs: list[dict[str, Any]]) -> list[charts.Axes]:
    """Scores by epoch; none before the first epoch is done."""
    try:
        return [charts.plot_curves(logs, key, name) for key, name in _CURVES.items()] if logs else []
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{TRAINLOG} of a fold is damaged ({error}); copy it again from the training."
        ) from error


def _sum_confusion(paths: list[Path], n_classes: int) -> np.ndarray:
    """The sum of the folds' confusion matrices, (K, K); zeros before the first is tested."""
    total = np.zeros((n_classes, n_classes), np.int64)
    for path in paths:
        try:
            mat = np.asarray(load_arrays(path))
        except ValueError as error:
            raise UserError(str(error)) from error
        if mat.shape != total.shape or mat.dtype.kind not in "iu":
            raise UserError(
                f"{path} is not a confusion matrix of {n_classes} classes; copy it again from the training."
            )
        total += mat
    return total


def _key_figures(
    config: dict[str, Any], confusion: np.ndarray, tests: dict[str, Any]
) -> list[tuple[str, str, str]]:
    """What the page begins with: name, value and a remark each."""
    asked = config.get("kfold")
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
    if isinstance(config.get("N_params"), int):
        figures.append(("Parameters", f"{config['N_params']:,}", "trainable"))
    return figures


def _spread(tests: dict[str, Any], key: str, digits: int) -> str:
    """Mean and standard deviation over folds."""
    values = [test[key] for test in tests.values() if isinstance(test.get(key), (int, float))]
    return f"folds: {np.mean(values):.{digits}f} \u00b1 {np.std(values):.{digits}f}" if values else ""


def _describe_classes(confusion: np.ndarray, labels: list[str], names: list[str]) -> list[dict[str, Any]]:
    """Per class: label, name, number of test parcels, scores (None where undefined), and what it is most taken for."""
    per_class, _ = confusion_matrix_analysis(confusion)
    rows = []
    for k, (label, name) in enumerate(zip(labels, names)):
        wrong = np.where(np.arange(len(labels)) == k, 0, confusion[k])
        other = int(wrong.argmax())
        taken = (
            f"{names[other] or labels[other]} ({wrong[other] / confusion[k].sum():.1%})"
            if wrong.any()
            else ""
        )
        scores = {score: None if np.isnan(value) else value for score, value in per_class[str(k)].items()}
        rows.append(
            {
                "label": label,
                "name": name,
                "parcels": int(confusion[k].sum()),
                "scores": scores,
                "taken_for": taken,
            }
        )
    return rows


def _calibrate(paths: list[Path]) -> dict[str, Any] | None:
    """The calibration curve of all folds together and its figures; None before the first is tested."""
    folds = [_read_dict(path) for path in paths]
    try:
        count, confidence, right = (
            np.sum([fold[name] for fold in folds], axis=0, dtype=float)
            for name in ("count", "confidence", "right")
        )
        edges = np.array(folds[0]["edges"] if folds else [], dtype=float)
        if not folds or not count.sum():
            return None
        chart = charts.plot_calibration(edges, count, confidence, right)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"{paths[0].name} of a fold is damaged ({error}); copy it again from the training."
        ) from error
    return {
        "chart": chart,
        "error": charts.calibration_error(count, confidence, right),
        "confidence": confidence.sum() / count.sum(),
        "accuracy": right.sum() / count.sum(),
    }


def main() -> None:
    """Command line: python -m reports.report RES_DIR."""
    parser = Parser(description="Makes report.html of a results folder.")
    parser.add_argument("res_dir", metavar="RES_DIR", help="results folder of train.py")
    print(f"Report: {write_report(parser.parse_args().res_dir)}")


if __name__ == "__main__":
    run_cli(main)
