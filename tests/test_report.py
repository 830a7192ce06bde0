"""The report of a training run, and the calibration that it shows."""

import json
import pickle
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from common.arrays import load_arrays
from common.errors import UserError
from data.folds import fold_splits
from data.samplers import BatchSampler
from dataset import PixelSetData, batch_loader
from learning.calibration import N_BINS, Calibration
from learning.metrics import confusion_matrix_analysis
from learning.results import load_normalisation
from learning.run import open_run
from models.stclassifier import PseLTae_pretrained
from reports import report
from reports.report import calibration_error, write_report
from tests.commands import run_command, run_train
from tests.folders import write_folder, write_meta

EVIL = '<script>alert("1")</script> & "wheat"'


class Page(HTMLParser):
    """What a page shows: its text, tags and attributes; checks that every tag is closed."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data.strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("data") / "set", n_parcels=30)
    write_meta(folder, "classes", {"label_44class": {"1": EVIL, "3": "Maize"}})
    return folder


@pytest.fixture(scope="module")
def results(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return run_train(
            folder, tmp_path_factory.mktemp("run") / "res", "--epochs 3", monkeypatch, pictures=True
        )


def test_training_writes_a_page_that_stands_alone(results: Path) -> None:
    text = (results / "report.html").read_text()
    page = Page(text)
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 1 and "link" not in names and "img" not in names
    for tag, attributes in page.tags:
        assert not {"src", "href", "onclick", "onload"} & set(attributes), (tag, attributes)
        assert attributes.get("xlink:href", "#").startswith(("#", "data:image/png;")), (tag, attributes)
    assert "http" not in text and "@import" not in text
    assert text.count("url(") == text.count("url(#")
    assert "prefers-color-scheme: dark" in text
    assert text.count("<svg") == 5  # three curves, the matrix, the calibration before and after
    ids = re.findall(r'xlink:href="#(\w+)"|url\(#(\w+)\)', text)
    assert ids and all(f'id="{one or other}"' in text for one, other in ids)


def test_labels_are_escaped(results: Path) -> None:
    text = (results / "report.html").read_text()
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text
    assert any(EVIL in row for row in Page(text).rows)


def test_shows_the_scores_of_the_run(results: Path) -> None:
    page = Page((results / "report.html").read_text())
    total = sum(load_arrays(results / f"Fold_{k}" / "conf_mat.pkl") for k in (1, 2, 3))
    per_class, overall = confusion_matrix_analysis(total)
    assert f"{100 * overall['Accuracy']:.1f} %" in page.text and f"{overall['MACRO_IoU']:.3f}" in page.text
    assert "python train.py --dataset_folder" in page.text and "--epochs 3" in page.text
    for k, (label, name) in enumerate([("1", EVIL), ("3", "Maize"), ("9", "")]):
        (row,) = (row for row in page.rows if row[:2] == [label, name])
        scores = ["\u2013" if np.isnan(value) else f"{value:.3f}" for value in per_class[str(k)].values()]
        assert row[2:7] == [str(total[k].sum()), *scores]
        assert f"{name or label} ({total[k].sum()})" in page.text  # in the matrix
    config = json.loads((results / "conf.json").read_text())
    shown = {row[0]: row[1] for row in page.rows if len(row) == 2}
    assert shown["lr"] == "0.001" and shown["sub_classes"] == "[1, 3, 9]"
    assert set(shown) >= set(config) - {"command", "class_names", "notes"}


def test_can_be_made_again(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    first = (results / "report.html").read_bytes()
    (results / "report.html").unlink()
    run_command(report.main, f"'{results}'", monkeypatch)
    assert capsys.readouterr().out == f"Report: {results / 'report.html'}\n"
    assert (results / "report.html").read_bytes() == first


def test_a_run_that_is_not_finished_has_a_report(results: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(results, copy)
    for name in ("conf_mat.pkl", "test_metrics.json", "calibration.json"):
        (copy / "Fold_2" / name).unlink()
    (copy / "Fold_3" / "trainlog.json").write_text("{}")
    text = write_report(copy).read_text()
    assert "2 of 3 folds tested" in Page(text).text and "Test parcels20" in "".join(
        Page(text).text.split("\n")
    )
    for fold in (1, 3):
        shutil.rmtree(copy / f"Fold_{fold}")
    text = write_report(copy).read_text()
    assert "0 of 3 folds tested" in Page(text).text and text.count("<svg") == 3
    shutil.rmtree(copy / "Fold_2")
    assert "<svg" not in write_report(copy).read_text()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("conf.json", b"[]", "conf.json is something else"),
        ("conf.json", b"{}", "conf.json is something else"),
        ("conf.json", b'{"sub_classes": 3}', "'sub_classes' is 3"),
        ("Fold_1/trainlog.json", b"3", "trainlog.json is something else"),
        ("Fold_1/trainlog.json", b'{"1": 2}', "trainlog.json of a fold is damaged"),
        ("Fold_1/calibration.json", b'{"count": 1}', "calibration.json of a fold is damaged"),
        ("Fold_1/calibration.json", b"{", "is not valid JSON"),
        ("Fold_1/conf_mat.pkl", b"junk", "cannot be read"),
        ("Fold_1/conf_mat.pkl", pickle.dumps(np.eye(3)), "holds no confusion matrix"),
        (
            "Fold_1/conf_mat.pkl",
            pickle.dumps(np.eye(2, dtype=int)),
            "of 2 classes, but the run tells 3 apart",
        ),
    ],
)
def test_damaged_files_in_one_sentence(
    name: str, content: bytes, message: str, results: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(results, copy)
    (copy / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        write_report(copy)


def test_calibration_counts_as_a_plain_loop_does() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(500, 4) * 3, torch.randint(4, (500,))
    logits[0] = torch.tensor([200.0, 0, 0, 0])  # a confidence of exactly 1
    calibration = Calibration()
    for part in (slice(0, 100), slice(100, 500)):
        calibration.add(logits[part], target[part])
    expected = np.zeros((3, N_BINS))
    for scores, true in zip(logits.double().numpy(), target.tolist()):
        probabilities = np.exp(scores - scores.max())
        probabilities /= probabilities.sum()
        place = min(int(probabilities.max() * N_BINS), N_BINS - 1)
        expected[:, place] += 1, probabilities.max(), probabilities.argmax() == true
    found = calibration.summary()
    np.testing.assert_allclose([found["count"], found["confidence"], found["right"]], expected, rtol=1e-12)
    np.testing.assert_allclose(found["edges"], np.linspace(0, 1, N_BINS + 1))
    gaps = [n / 500 * abs(k / n - sure / n) for n, sure, k in expected.T if n]
    assert calibration_error(*expected) == pytest.approx(sum(gaps))


def test_calibration_of_a_fold_is_that_of_its_test_parcels(results: Path, folder: Path) -> None:
    norm, stats = load_normalisation(results)
    data = PixelSetData(
        folder, "label_44class", 6, [1, 3, 9], norm, "geomfeat", extra_stats=stats
    ).evaluation(1)
    kwargs = open_run(results).architecture.hyperparameters()
    for k, (_, _, test) in enumerate(fold_splits(30, 3, 1), start=1):
        model = PseLTae_pretrained(results, kwargs, device="cpu", fold=k)
        expected = Calibration()
        with torch.no_grad():
            for x, y in batch_loader(data, BatchSampler(test, 4), 0):
                expected.add(model(x), y)
        stored = json.loads((results / f"Fold_{k}" / "calibration.json").read_text())
        assert stored["count"] == expected.summary()["count"] and sum(stored["count"]) == len(test)
        np.testing.assert_allclose(stored["confidence"], expected.summary()["confidence"], rtol=1e-5)
        matrix = load_arrays(results / f"Fold_{k}" / "conf_mat.pkl")
        assert sum(stored["right"]) == np.trace(matrix)


def test_shows_calibration_before_and_after(results: Path, tmp_path: Path) -> None:
    page = Page((results / "report.html").read_text())
    folds = [json.loads((results / f"Fold_{k}" / "calibration.json").read_text()) for k in (1, 2, 3)]
    expected = []
    for bins in (folds, [fold["calibrated"] for fold in folds]):
        sums = [np.sum([each[name] for each in bins], axis=0) for name in ("count", "confidence", "right")]
        expected.append((f"{calibration_error(*sums):.3f}", f"{sums[1].sum() / 30:.3f}"))
    words = " ".join(page.text.split())
    found = re.findall(r"(\d\.\d+), with mean confidence (\d\.\d+)", words)
    assert found == expected and expected[0] != expected[1]
    copy = Path(shutil.copytree(results, tmp_path / "copy"))  # an older run
    (copy / "Fold_2" / "calibration.json").write_text(json.dumps(folds[1] | {"calibrated": None}))
    words = " ".join(Page(write_report(copy).read_text()).text.split())
    assert re.findall(r"mean confidence (\d\.\d+)", words) == [expected[0][1]]


def notes(results: Path) -> str:
    """What the list of notes says."""
    found = re.search(r'<ul class="notes">(.*?)</ul>', write_report(results).read_text(), flags=re.S)
    return Page(found[1]).text if found else ""


def write_counts(results: Path, parts: list[list[int]]) -> None:
    """Gives every fold these numbers of test parcels by class, all classified right."""
    for fold, counts in enumerate(parts, start=1):
        (results / f"Fold_{fold}" / "conf_mat.pkl").write_bytes(pickle.dumps(np.diag(counts)))


def test_says_which_classes_no_fold_or_one_tests(results: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(results, tmp_path / "copy")
    write_counts(copy, [[5, 5, 3], [5, 5, 3], [5, 5, 3]])
    assert notes(copy) == ""
    write_counts(copy, [[5, 5, 0], [5, 5, 3], [5, 5, 3]])
    assert re.findall(r"\d", notes(copy)) == ["1", "9"]  # fold 1, class 9
    write_counts(copy, [[5, 5, 0], [5, 5, 0], [5, 5, 0]])
    assert re.findall(r"\d", notes(copy)) == ["9"]


def test_says_what_the_training_said_of_the_folds(results: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(results, tmp_path / "copy")
    config = json.loads((copy / "conf.json").read_text())
    assert config["notes"] == []
    (copy / "conf.json").write_text(json.dumps(config | {"notes": ["Fold 2: no training parcel of <b>"]}))
    assert notes(copy).strip() == "Fold 2: no training parcel of <b>"
    del config["notes"]  # an older run
    (copy / "conf.json").write_text(json.dumps(config))
    assert notes(copy) == ""


def test_says_that_a_validation_tells_nothing(results: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(results, tmp_path / "copy")
    log = json.loads((copy / "Fold_2" / "trainlog.json").read_text())
    log["2"]["val_IoU"] = 1.0
    (copy / "Fold_2" / "trainlog.json").write_text(json.dumps(log))
    assert re.findall(r"Fold 2 .* 1 in epoch 2", notes(copy))


def test_says_that_data_are_simulated(results: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(results, tmp_path / "copy")
    config = json.loads((copy / "conf.json").read_text())
    for simulated in (True, False):
        (copy / "conf.json").write_text(json.dumps(config | {"simulated": simulated}))
        text = Page(write_report(copy).read_text()).text
        assert ("Simulated" in text.partition("Accuracy")[0]) == simulated
