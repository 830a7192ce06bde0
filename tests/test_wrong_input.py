"""Mistakes of the user: each ends in one sentence that says what to do, exit code 2, and nothing trained."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import inference
import train
from common.arrays import load_arrays
from common.errors import run_cli
from dataset import PixelSetData
from learning import crossvalidation
from learning.results import CONFUSION, save_overall
from models.weights import CHECKPOINT
from tests.folders import NOMENCLATURE, write_folder, write_meta
from tests.processes import PATIENCE

ROOT = Path(__file__).resolve().parent.parent
STATISTICS = "S2-2017-T31TFM-meanstd.pkl"
SMALL = "--npixel 4 --num_workers 0 --kfold 3 --epochs 1 --device cpu".split()
MODEL = "--mlp1 [4,8] --mlp2 [20,16] --n_head 2 --d_k 2 --mlp3 [16] --mlp4 [16,3]".split()

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning", "error::numpy.exceptions.ComplexWarning")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pristine") / "data")


@pytest.fixture
def folder(tmp_path, pristine) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "data"))


@pytest.fixture
def command(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs a script's main function in this process; gives its exit code and what it printed."""

    def run(script: Any, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            run_cli(script.main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def check_refusal(result: tuple[int, str, str], *words: object) -> None:
    """One sentence on stderr, with all of these words in it, and exit code 2."""
    code, _, err = result
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    for word in words:
        assert str(word) in err
    assert code == 2 and len(err) < 700


@pytest.fixture
def refuse_training(command, folder, tmp_path, monkeypatch) -> Callable[..., None]:
    """Runs train.py on the folder, which must be refused with these words before anything is trained."""

    def fail(*args: object) -> None:
        raise AssertionError("training has begun")

    def run(arguments: list[str], *words: object, data: Path = folder) -> None:
        monkeypatch.setattr(crossvalidation, "train_fold", fail)
        result = command(train, "--dataset_folder", data, "--res_dir", tmp_path / "res", *SMALL, *arguments)
        check_refusal(result, *words)
        assert not list(tmp_path.glob("res/Fold_*"))

    return run


# -------------------------------------------------------------------------------------------- changes to a folder


def edit(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Replaces the content of META/<name>.json by what `change` makes of it, in place or as a result."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / "META" / f"{name}.json").read_text())
        result = change(content)
        write_meta(folder, name, content if result is None else result)

    return apply


def label(value: Any) -> Callable[[Path], None]:
    return edit("labels", lambda content: content[NOMENCLATURE].update({"5": value}))


def date(index: str, value: Any) -> Callable[[Path], None]:
    return edit("dates", lambda content: content.update({index: value}))


def feature(value: Any) -> Callable[[Path], None]:
    return edit("geomfeat", lambda content: content.update({"5": value}))


def put(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size]) and None


def remove(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return apply


def array(values: Any, name: str = "5") -> Callable[[Path], None]:
    return lambda folder: np.save(folder / "DATA" / f"{name}.npy", values, allow_pickle=True)


def every_array(*shape: int) -> Callable[[Path], None]:
    return lambda folder: [array(np.ones(shape), str(i))(folder) for i in range(1, 13)] and None


def statistics(value: Any) -> Callable[[Path], None]:
    return put(STATISTICS, pickle.dumps(value))


def make_folder(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).mkdir()


def one_value(value: float, dtype: type = np.float32) -> np.ndarray:
    values = np.ones((5, 4, 3), dtype)
    values[2, 1, 0] = value
    return values


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape)


def empty_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def empty_data(folder: Path) -> None:
    remove("DATA")(folder)
    make_folder("DATA")(folder)


def data_is_a_file(folder: Path) -> None:
    remove("DATA")(folder)
    (folder / "DATA").write_text("")


def link_to_nowhere(folder: Path) -> None:
    (folder / "DATA" / "99.npy").symlink_to(folder / "nowhere")


def npz(folder: Path) -> None:
    with open(folder / "DATA" / "5.npy", "wb") as file:
        np.savez(file, pixels=ones(5, 4, 3))


FOLDERS = {
    # the folder
    "missing": (remove(""), ["is not a folder", "DATA and META"]),
    "empty": (empty_folder, ["contains no folder DATA"]),
    "no parcel": (empty_data, ["DATA contains no .npy file"]),
    "DATA is a file": (data_is_a_file, ["contains no folder DATA"]),
    "no META": (remove("META"), ["META", "No such file"]),
    # the pixels
    "truncated": (cut("DATA/5.npy", -3), ["5.npy is truncated", "expected", "found"]),
    "truncated header": (cut("DATA/5.npy", 50), ["5.npy is not a NumPy array file"]),
    "empty file": (cut("DATA/5.npy", 0), ["5.npy is not a NumPy array file"]),
    "text": (put("DATA/5.npy", b"hello world"), ["5.npy is not a NumPy array file"]),
    "several arrays": (npz, ["5.npy is not a NumPy array file"]),
    "a folder": (make_folder("DATA/99.npy"), ["99.npy", "Is a directory"]),
    "a link to nowhere": (link_to_nowhere, ["99.npy cannot be read"]),
    "objects": (array(np.full((5, 4, 3), None)), ["5.npy holds values of type object"]),
    "words": (array(np.full((5, 4, 3), "a")), ["5.npy holds values of type <U1"]),
    "complex": (array(np.ones((5, 4, 3), complex)), ["5.npy holds values of type complex128"]),
    "long doubles": (array(np.ones((5, 4, 3), np.longdouble)), ["5.npy holds values of type"]),
    "other T": (array(ones(6, 4, 3)), ["5.npy has 6 dates", "dates.json lists 5 dates", "must agree"]),
    "other C": (array(ones(5, 3, 3)), ["5.npy has 3 channels", "1.npy has 4"]),
    "one axis": (array(ones(5)), ["5.npy has shape (5,)", "dates, channels, pixels"]),
    "two axes": (array(ones(4, 5)), ["5.npy has 5 channels", "1.npy has 4"]),
    "four axes": (array(ones(5, 4, 3, 1)), ["5.npy has shape (5, 4, 3, 1)"]),
    "no date": (every_array(0, 4, 3), ["has shape (0, 4, 3)"]),
    "no channel": (every_array(5, 0, 3), ["has shape (5, 0, 3)"]),
    "no pixel at all": (every_array(5, 4, 0), ["no file", "contains a pixel"]),
    "NaN": (
        array(one_value(np.nan)),
        ["5.npy has a pixel that is NaN in some", "date 2", "NaN in all channels"],
    ),
    "infinity": (array(one_value(-np.inf)), ["5.npy contains infinity", "date 2, channel 1"]),
    "beyond float32": (array(one_value(1e300, np.float64)), ["5.npy contains", "date 2, channel 1"]),
    "a name": (array(ones(5, 4, 3), "parcel_1"), ["parcel_1.npy", "whole number"]),
    "a copy": (array(ones(5, 4, 3), "5 (1)"), ["5 (1).npy", "whole number"]),
    "leading zeros": (array(ones(5, 4, 3), "007"), ["007.npy", "whole number"]),
    "an id too long": (array(ones(5, 4, 3), "9" * 20), ["9" * 20, "whole number"]),
    # labels
    "no labels": (remove("META/labels.json"), ["labels.json", "No such file", "{nomenclature: {parcel id"]),
    "labels a list": (
        edit("labels", lambda _: [1, 2]),
        ["labels.json", "{nomenclature: {parcel id: label}}"],
    ),
    "no nomenclature": (
        edit("labels", lambda content: content[NOMENCLATURE]),
        ["labels.json", "{nomenclature"],
    ),
    "labels of a list": (edit("labels", lambda _: {NOMENCLATURE: [1]}), ["labels.json", "{nomenclature: "]),
    "labels empty": (
        edit("labels", lambda _: {}),
        ["labels.json has no nomenclature", "label_44class", "--labels"],
    ),
    "labels damaged": (put("META/labels.json", b'{"label'), ["labels.json is not valid JSON", "expected {"]),
    "labels not text": (put("META/labels.json", b"\xff\xfe{}"), ["labels.json is not valid JSON"]),
    "labels nested": (put("META/labels.json", b"[" * 100_000), ["labels.json is not valid JSON"]),
    "no parcel with a label": (
        edit("labels", lambda content: content.update({NOMENCLATURE: {"99": 1}})),
        ["no parcel", "--labels"],
    ),
    "label a word": (label("wheat"), ["parcel 5 has the label 'wheat'", "parcel 1 has 1", "text for all"]),
    "label quoted": (label("3"), ["parcel 5 has the label '3'", "without quotes"]),
    "label with a point": (label(3.0), ["parcel 5 has the label 3.0", "whole number"]),
    "label a list": (label([1]), ["parcel 5 has the label [1]", "whole number"]),
    "label true": (label(True), ["parcel 5 has the label True", "whole number"]),
    "label too large": (label(10**30), ["parcel 5 has the label 1000", "whole number"]),
    "one class": (
        edit("labels", lambda content: {NOMENCLATURE: dict.fromkeys(content[NOMENCLATURE], 1)}),
        ["only one class, 1"],
    ),
    # dates
    "no dates": (remove("META/dates.json"), ["dates.json", "No such file", '{"0": YYYYMMDD']),
    "too few dates": (
        edit("dates", lambda c: c.pop("4") and None),
        ["1.npy has 5 dates", "dates.json lists 4 dates"],
    ),
    "too many dates": (date("5", 20180101), ["1.npy has 5 dates", "dates.json lists 6 dates"]),
    "dates a list": (edit("dates", lambda c: list(c.values())), ["dates.json", '{"0": YYYYMMDD']),
    "dates from 1": (
        edit("dates", lambda content: {str(int(key) + 1): day for key, day in content.items()}),
        ["dates.json", '{"0": YYYYMMDD'],
    ),
    "month 13": (date("2", 20171301), ["dates.json: date 2 is 20171301", "YYYYMMDD"]),
    "date with slashes": (date("2", "2017/03/01"), ["dates.json: date 2 is '2017/03/01'", "YYYYMMDD"]),
    "date of seven digits": (date("2", 2017113), ["dates.json: date 2 is 2017113", "YYYYMMDD"]),
    "date null": (date("2", None), ["dates.json: date 2 is None"]),
    # extra features
    "a parcel without features": (
        edit("geomfeat", lambda content: content.pop("5") and None),
        ["geomfeat.json has no entry for parcel 5", "--geomfeat 0"],
    ),
    "features a list": (edit("geomfeat", lambda _: [1]), ["geomfeat.json", "{parcel id: number"]),
    "too few features": (feature([1, 2]), ["geomfeat.json: parcel 5 has 2", "parcel 1 has 4"]),
    "feature null": (
        feature([1, 2, None, 4]),
        ["geomfeat.json: parcel 5 has [1, 2, None, 4]", "finite number"],
    ),
    "feature NaN": (feature([1, 2, float("nan"), 4]), ["geomfeat.json: parcel 5", "finite number"]),
    "feature a word": (feature("large"), ["geomfeat.json: parcel 5 has 'large'", "finite number"]),
    "feature too large": (feature([1, 2, 10**400, 4]), ["geomfeat.json: parcel 5", "finite number"]),
    "feature that overflows": (
        feature([1, 2, 1e300, 4]),
        ["geomfeat.json: parcel 5 has 1e+300", "too large"],
    ),
    "features empty": (
        edit("geomfeat", lambda content: {parcel: [] for parcel in content}),
        ["geomfeat.json: parcel 1 has []"],
    ),
    # mean and standard deviation
    "mean of other T": (statistics((ones(6, 4), ones(6, 4))), [STATISTICS, "(6, 4)", "two (5, 4)"]),
    "mean of other C": (statistics((ones(5), ones(5))), [STATISTICS, "shape (5,)", "(4,)"]),
    "three arrays": (statistics((ones(4),) * 3), [STATISTICS, "is not a mean and a standard deviation"]),
    "one array": (statistics(ones(5, 4)), [STATISTICS, "is not a mean and a standard deviation"]),
    "a dictionary": (statistics({"mean": ones(4), "std": ones(4)}), [STATISTICS, "is not a mean"]),
    "no arrays": (statistics("mean"), [STATISTICS, "is not a mean and a standard deviation"]),
    "deviation 0": (statistics((ones(4), 0 * ones(4))), [STATISTICS, "not above 0"]),
    "mean NaN": (statistics((ones(4) * np.nan, ones(4))), [STATISTICS, "not finite"]),
    "mean of objects": (statistics((np.array([1, 2, 3, None]), ones(4))), [STATISTICS, "of type object"]),
    "mean complex": (statistics((1j * ones(4), ones(4))), [STATISTICS, "complex128"]),
    "mean of a class": (statistics((Path("a"), ones(4))), [STATISTICS, "pathlib", "NumPy arrays"]),
    "statistics damaged": (put(STATISTICS, b"garbage"), [STATISTICS, "cannot be read"]),
    "units are text": (
        put("META/info.json", b'{"nodata": null, "units": "1"}'),
        ["info.json: units is '1'", "number"],
    ),
    "units of 0": (put("META/info.json", b'{"units": 0}'), ["info.json: units is 0"]),
    "nodata is text": (put("META/info.json", b'{"nodata": "0"}'), ["info.json: nodata is '0'"]),
    "flat names": (
        put("META/classes.json", b'{"1": "wheat"}'),
        ["classes.json is something else", "nomenclature"],
    ),
    "statistics truncated": (
        put(STATISTICS, pickle.dumps((ones(4), ones(4)))[:-20]),
        [STATISTICS, "cannot be read"],
    ),
    "statistics empty": (lambda folder: (folder / STATISTICS).touch(), [STATISTICS, "cannot be read"]),
    "statistics a folder": (make_folder(STATISTICS), [STATISTICS, "Is a directory"]),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_dataset_folder(refuse_training, folder, case):
    change, words = FOLDERS[case]
    change(folder)
    refuse_training([], *words)


def test_a_statistics_file_of_another_kind_is_named_in_one_line(refuse_training, tmp_path):
    np.savez(tmp_path / "norm.npz", mean=ones(4), std=ones(4))
    refuse_training(["--norm", tmp_path / "norm.npz"], "norm.npz", "cannot be read")


def test_labels_with_a_byte_order_mark_are_read(command, folder, tmp_path, monkeypatch):
    """Windows editors write one."""
    path = folder / "META" / "labels.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(PixelSetData(folder, NOMENCLATURE, 4)) == 12


@pytest.mark.parametrize(
    "n, kfold, words", [(2, 3, ["2 parcels"]), (12, 13, ["12 parcels"]), (5, 3, ["5 parcels"])]
)
def test_too_few_parcels(refuse_training, tmp_path, n, kfold, words):
    refuse_training(["--kfold", kfold], *words, "--kfold", data=write_folder(tmp_path / "few", n))


# ----------------------------------------------------------------------------------------------- flags of train.py

FLAGS = {
    "--kfold 2": ["--kfold is 2", "at least 3"],
    "--batch_size 1": ["--batch_size is 1", "at least 2"],
    "--batch_size 0": ["--batch_size", "'0'"],
    "--epochs 1e3": ["--epochs", "'1e3'"],
    "--lr fast": ["--lr", "'fast'"],
    "--lr nan": ["--lr", "'nan'"],
    "--gamma -1": ["--gamma"],
    "--dropout 1": ["--dropout", "0 to below 1"],
    "--rdm_seed -1": ["--rdm_seed"],
    "--rdm_seed 5000000000": ["--rdm_seed"],
    "--npixel 0": ["--npixel"],
    "--npixel 1000000000": ["1000000000 pixels", "GB", "the largest parcel has", "--npixel or --batch_size"],
    "--nhead 8": ["--nhead", "--help"],
    "8": ["unrecognized arguments: 8"],
    "--device gpu": ["--device", "'gpu'", "cpu, cuda"],
    "--device mps": ["--device", "mps", "cpu, cuda"],
    "--device meta": ["--device", "meta", "cpu, cuda"],
    "--preset LTAE/10k": ["--preset LTAE/10k is unknown", "LTAE/9k"],
    "--preset LTAE": ["--preset LTAE is unknown", "LTAE/9k"],
    "--preset GRU/15k --tae": ["--tae, --gru and --tcnn"],
    "--tae --gru": ["--tae, --gru and --tcnn"],
    "--gru --tcnn": ["--tae, --gru and --tcnn"],
    "--mlp3 128;64": ["--mlp3", "'128;64'", "[128,64]"],
    "--mlp3 [128,,64]": ["--mlp3", "[128,64]"],
    "--mlp3 []": ["--mlp3", "[128,64]"],
    "--mlp3 [128,0]": ["--mlp3", "contains a 0"],
    "--mlp3 128.5": ["--mlp3", "[128,64]"],
    "--mlp3 [128,64": ["--mlp3", "'[128,64'", "[128,64]"],
    "--mlp1 [4]": ["mlp1 is [4]", "at least two"],
    "--sub_classes [1,3": ["--sub_classes", "'[1,3'", "[1,3]"],
    "--labels other": ["labels.json has no nomenclature 'other'", NOMENCLATURE, "--labels"],
    "--sub_classes [1,3,7]": ["--sub_classes contains 7", "1, 3, 9"],
    "--sub_classes [1]": ["only one class, 1"],
    "--sub_classes [1,3,1]": ["--sub_classes", "twice"],
    "--norm nowhere.pkl": ["nowhere.pkl", "No such file"],
    "--geomfeat 2": ["--geomfeat"],
    # sizes that contradict the data
    "--input_dim 10": ["--input_dim is 10", "4 channels"],
    "--lms 24": ["--lms is 24", "5 dates"],
    "--num_classes 20": ["--num_classes is 20", "3 classes"],
    "--mlp1 [10,32,64]": ["mlp1[0] is 10", "4"],
    "--mlp4 [128,64,32,20]": ["--mlp4 ends with 20", "3 classes"],
    # sizes that contradict each other
    "--mlp2 [100,128]": ["mlp2[0] is 100", "132"],
    "--pooling mean --mlp2 [132,128]": ["mlp2[0] is 132", "68"],
    "--geomfeat 0 --mlp2 [132,128]": ["mlp2[0] is 132", "128"],
    "--pooling mean_middle": ["pooling", "'middle'", "mean, std, max, min"],
    "--mlp3 [100,128] --d_model 256": ["100", "256", "mlp3"],
    "--mlp3 [100,128]": ["--mlp3 starts with 100", "--n_head 16"],
    "--d_model 100": ["d_model=100", "n_head=16"],
    "--n_head 3": ["n_head=3"],
    "--mlp3 [256,128] --mlp4 [64,3]": ["mlp4[0] is 64", "128"],
    "--gru --hidden_dim 32 --mlp4 [64,3]": ["mlp4[0] is 64", "32"],
    "--tcnn --mlp3 [64] --mlp4 [32,3]": ["mlp4[0] is 32", "64"],
    "--tae --mlp3 [101,128]": ["--mlp3 starts with 101", "--n_head 4"],
    "--tae --mlp3 [512,128] --d_model 64": ["512", "64", "256", "mlp3"],
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags(refuse_training, flags):
    refuse_training(flags.split(), *FLAGS[flags])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there(refuse_training, name):
    refuse_training(["--device", name], f"--device {name}", "no GPU")


@pytest.mark.gpu
def test_a_gpu_of_too_high_a_number(refuse_training):
    refuse_training(["--device", "cuda:99"], "cuda:99", "GPUs")


def test_features_that_are_asked_for_but_missing(refuse_training, folder):
    (folder / "META" / "geomfeat.json").unlink()
    refuse_training(["--geomfeat", "1"], "geomfeat.json", "No such file", "--geomfeat 0")


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_place_that_cannot_be_written(refuse_training, tmp_path, place):
    (tmp_path / "file").write_text("")
    refuse_training(["--res_dir", tmp_path / place], tmp_path / place, "cannot be written", "choose another")
    refuse_training(["--cache_dir", tmp_path / place], tmp_path / place, "cannot be written", "--cache_dir")


# ------------------------------------------------------------------------------------------------- earlier results


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pristine) -> Path:
    """The results of a small training."""
    results = tmp_path_factory.mktemp("trained") / "res"
    arguments = ["--dataset_folder", str(pristine), "--res_dir", str(results), *SMALL, *MODEL]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train", *arguments])
        train.main()
    return results


def test_earlier_results_are_not_overwritten(refuse_training, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "earlier")
    before = {path: path.read_bytes() for path in (tmp_path / "earlier").rglob("*") if path.is_file()}
    refuse_training(["--res_dir", tmp_path / "earlier"], "earlier run", "--overwrite", "--res_dir")
    after = {path: path.read_bytes() for path in (tmp_path / "earlier").rglob("*") if path.is_file()}
    assert after == before


def test_weights_without_a_configuration_are_not_overwritten(refuse_training, trained, tmp_path):
    """Such as the published ones."""
    shutil.copytree(trained, tmp_path / "earlier")
    (tmp_path / "earlier" / "conf.json").unlink()
    refuse_training(["--res_dir", tmp_path / "earlier"], "earlier", "--overwrite", "--res_dir")


def test_overwriting_leaves_no_fold_of_the_earlier_run(command, trained, folder, tmp_path):
    """Inference would mix its weights with those of the new one."""
    results = Path(shutil.copytree(trained, tmp_path / "res"))
    shutil.copytree(results / "Fold_3", results / "Fold_4")
    code, _, err = command(
        train, "--dataset_folder", folder, "--res_dir", results, "--overwrite", *SMALL, *MODEL
    )
    assert code == 0, err
    assert sorted(path.name for path in results.glob("Fold_*")) == ["Fold_1", "Fold_2", "Fold_3"]


# ------------------------------------------------------------------------------------------------------ inference


@pytest.fixture
def results(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "res"))


@pytest.fixture
def infer(command, results, folder, tmp_path) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object, weights: Path = results, data: Path = folder) -> tuple[int, str, str]:
        return command(
            *(inference, "--weight_dir", weights, "--dataset_folder", data, "--num_workers", 0),
            *("--output_dir", tmp_path / "out", "--device", "cpu", *arguments),
        )

    return run


def test_unchanged_results_are_accepted(infer, tmp_path):
    code, _, err = infer()
    assert code == 0 and not err and (tmp_path / "out" / "predictions.csv").exists()


INFERENCE_FLAGS = {
    "--fold 7": ["fold 7", "1, 2, 3"],
    "--fold 0": ["fold 0", "1, 2, 3"],
    "--fold some": ["'some'", "'all' or a number from 1"],
    "--fold ²": ["'²'", "'all' or a number from 1"],
    "--labels other": ["no nomenclature 'other'", "--labels"],
    "--geomfeat 0": ["4 extra features", "--geomfeat"],
    "--norm nowhere.pkl": ["nowhere.pkl", "No such file"],
    "--n_head 4": [CHECKPOINT, "another architecture", "attention_heads.Q is (2, 2) instead of (4, 2)"],
    "--positions order": [CHECKPOINT, "another architecture", "position_enc"],
    "--tcnn": ["--tcnn", "L-TAE", "leave the flag out"],
    "--tae --gru": ["--tae, --gru and --tcnn"],
    "--preset LTAE/34k": [CHECKPOINT, "another architecture"],
    "--input_dim 10": ["10", "4"],
    "--lms 24": ["--lms", "5 dates"],
    "--num_classes 20": ["--num_classes", "3"],
    "--sub_classes [1,3]": ["--sub_classes", "2", "3"],
    "--sub_classes [1,3,9,12]": ["--sub_classes", "4", "3"],
    "--sub_classes [1,3,3]": ["--sub_classes", "twice"],
    "--device mps": ["--device", "mps", "cpu, cuda"],
}


@pytest.mark.parametrize("flags", INFERENCE_FLAGS)
def test_flags_of_inference(infer, tmp_path, flags):
    check_refusal(infer(*flags.split()), *INFERENCE_FLAGS[flags])
    assert not (tmp_path / "out" / "predictions.csv").exists()


def test_weights_that_are_not_there(infer, folder, tmp_path):
    check_refusal(infer(weights=tmp_path / "nowhere"), "--weight_dir", "nowhere is not a folder")
    check_refusal(infer(weights=folder), "--weight_dir", "holds no Fold_k/model.pth.tar")
    (tmp_path / "empty" / "Fold_1").mkdir(parents=True)
    check_refusal(infer(weights=tmp_path / "empty"), "holds no Fold_k/model.pth.tar")


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_predictions_that_cannot_be_written(infer, tmp_path, place):
    (tmp_path / "file").write_text("")
    check_refusal(infer("--output_dir", tmp_path / place), tmp_path / place, "cannot be written")


def save(value: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


def change_weights(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        checkpoint = torch.load(path, weights_only=True)
        weights = checkpoint["state_dict"]
        weights |= {key: change(value) for key, value in weights.items() if value.is_floating_point()}
        torch.save(checkpoint, path)

    return apply


CHECKPOINTS = {
    "empty": (lambda path: path.write_bytes(b"") and None, "cannot be read as a checkpoint"),
    "junk": (lambda path: path.write_bytes(b"junk") and None, "cannot be read as a checkpoint"),
    "cut": (
        lambda path: path.write_bytes(path.read_bytes()[:3000]) and None,
        "cannot be read as a checkpoint",
    ),
    "folder": (lambda path: path.unlink() or path.mkdir(), "cannot be read as a checkpoint"),
    "module": (save(torch.nn.Linear(2, 2)), "more than tensors"),
    "list": (save([1]), "is not a checkpoint"),
    "bare weights": (save({"weight": torch.ones(2)}), "is not a checkpoint"),
    "numbers": (save({"state_dict": {"weight": 1}}), "is not a checkpoint"),
    "no weights": (save({"state_dict": {}}), "another architecture"),
    "other keys": (save({"state_dict": {1: torch.ones(2)}}), "another architecture"),
    "NaN": (change_weights(lambda value: value * float("nan")), "NaN or infinite"),
    "sparse": (change_weights(lambda value: value.to_sparse()), "is not a checkpoint"),
    "meta": (change_weights(lambda value: value.to("meta")), "is not a checkpoint"),
    "complex": (change_weights(lambda value: value.to(torch.complex64)), "is not a checkpoint"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_damaged_checkpoints(infer, results, tmp_path, case):
    change, words = CHECKPOINTS[case]
    change(results / "Fold_2" / CHECKPOINT)
    check_refusal(infer(), "--weight_dir", f"Fold_2/{CHECKPOINT}", words)
    assert not (tmp_path / "out" / "predictions.csv").exists()


def arrays(**values: Any) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **{"mean": ones(5, 4), "std": ones(5, 4), **values})


NORMALISATIONS = {
    "junk": lambda path: path.write_bytes(b"junk") and None,
    "other": lambda path: np.savez(path, a=1),
    "shape": arrays(mean=ones(6, 4)),
    "objects": arrays(mean=np.array([None])),
    "zero": arrays(std=0 * ones(5, 4)),
    "no features": arrays(),
    "half": arrays(extra_mean=ones(4)),
    "other number": arrays(extra_mean=ones(3), extra_std=ones(3)),
    "a number": arrays(extra_mean=np.array(1.0), extra_std=ones(4)),
    "NaN": arrays(extra_mean=ones(4), extra_std=ones(4) * np.nan),
}


@pytest.mark.parametrize("case", NORMALISATIONS)
def test_damaged_normalisation(infer, results, case):
    NORMALISATIONS[case](results / "normalisation.npz")
    check_refusal(infer(), "normalisation.npz")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '"LTAE"', "[" * 100_000])
def test_damaged_configuration(infer, results, content):
    (results / "conf.json").write_text(content)
    check_refusal(infer(), "conf.json")


NUMBERS = [
    "input_dim",
    "n_head",
    "d_k",
    "T",
    "num_classes",
    "n_extra",
    "grid_days",
    "npixel",
    "rdm_seed",
    "hidden_dim",
]
LISTS = ["mlp1", "mlp2", "mlp3", "mlp4", "nker", "sub_classes"]
OTHERS = {
    "pooling": [5, None, ["mean"]],
    "positions": ["x", 5, None],
    "tae": [1, "x", None],
    "gru": [1],
    "tcnn": [1],
}
WRONG = [(name, value) for name in NUMBERS for value in ("abc", None, -1, 1.5, [], True)]
WRONG += [(name, value) for name in LISTS for value in ("abc", None, 5, {}, [1, "a"], [None], [1.5])]
WRONG += [(name, value) for name, values in OTHERS.items() for value in values]
WRONG += [("d_model", value) for value in ("abc", -1, 1.5, [])]
WRONG += [("dropout", value) for value in ("abc", None, -1, 1.5, [])]
WRONG += [("lms", value) for value in ("abc", -1, 1.5, [], True)]
WRONG += [
    (name, value) for name in ("date_positions", "grid") for value in ("abc", 5, {}, [1, "a"], [None], [1.5])
]
WRONG += [("nodata", value) for value in ("abc", [], True)]
WRONG += [("season_start", value) for value in ("10-01", 5, [1], [1, 2, 3])]
WRONG += [("until", value) for value in ("6-30", "02-30", 20170630, [6, 30])]
WRONG += [("labels", value) for value in (5, ["a"], {})]


@pytest.mark.parametrize("name", sorted({name for name, _ in WRONG}))
def test_configuration_of_wrong_types(infer, results, name):
    path = results / "conf.json"
    config = json.loads(path.read_text())
    for value in (value for wrong, value in WRONG if wrong == name):
        path.write_text(json.dumps(config | {name: value}))
        check_refusal(infer(), "conf.json", name)


def test_an_entry_that_the_configuration_lacks_has_its_default(infer, results, tmp_path):
    path = results / "conf.json"
    config = json.loads(path.read_text())
    assert infer()[0] == 0
    expected = (tmp_path / "out" / "predictions.csv").read_bytes()
    # What was added since, or holds the default anyway.
    added = (
        "tae",
        "nodata",
        "nodata_declared",
        "units",
        "season_start",
        "until",
        "class_names",
        "rdm_seed",
        "grid_days",
        "preset",
    )
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in added}))
    assert infer()[0] == 0
    assert (tmp_path / "out" / "predictions.csv").read_bytes() == expected
    for name, words in (("mlp1", ["mlp1[0] is 10", "4 channels"]), ("sub_classes", ["20", "3"])):
        path.write_text(json.dumps({key: value for key, value in config.items() if key != name}))
        check_refusal(infer(), *words)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"n_dates": 6}, ["5 dates", "has 6"]),
        ({"n_channels": 5}, ["4 channels", "has 5"]),
        ({"extra_size": 3}, ["geomfeat.json", "3", "trained with 4"]),
        (
            {"extra_size": 0},
            ["geomfeat.json", "No such file", "use a model that was trained with --geomfeat 0"],
        ),
    ],
)
def test_data_of_another_shape_than_trained_on(infer, tmp_path, options, words):
    check_refusal(infer(data=write_folder(tmp_path / "other", **options)), *words)


@pytest.mark.parametrize(
    "case", ["missing", "empty", "truncated", "NaN", "no dates", "labels a list", "label quoted"]
)
def test_dataset_folder_of_inference(infer, folder, case):
    change, words = FOLDERS[case]
    change(folder)
    check_refusal(infer(), *words)


# --------------------------------------------------------------------------------------------------- malicious files


class Malicious:
    """Unpickled freely, it would make a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def trace(tmp_path) -> Path:
    """The file that a malicious pickle makes; first that it does."""
    pickle.loads(pickle.dumps(Malicious(tmp_path / "trace")))
    (tmp_path / "trace").rmdir()
    return tmp_path / "trace"


def test_malicious_statistics(refuse_training, folder, trace, tmp_path):
    (folder / STATISTICS).write_bytes(pickle.dumps((Malicious(trace), ones(4))))
    refuse_training([], STATISTICS, "cannot be read", "mkdir")
    (tmp_path / "mine.pkl").write_bytes(pickle.dumps(Malicious(trace), 0))
    refuse_training(["--norm", tmp_path / "mine.pkl"], "mine.pkl", "cannot be read", "mkdir")
    assert not trace.exists()


def test_malicious_checkpoint(infer, results, trace):
    path = results / "Fold_2" / CHECKPOINT
    checkpoint = torch.load(path, weights_only=True)
    for zipped in (True, False):
        torch.save(checkpoint | {"epoch": Malicious(trace)}, path, _use_new_zipfile_serialization=zipped)
        check_refusal(infer(), f"Fold_2/{CHECKPOINT}", "more than tensors")
    assert not trace.exists()


def test_malicious_normalisation(infer, results, trace):
    np.savez(results / "normalisation.npz", mean=np.array([Malicious(trace)]), std=ones(5, 4))
    check_refusal(infer(), "normalisation.npz")
    assert not trace.exists()


def test_malicious_confusion_matrix(results, trace):
    path = results / "Fold_2" / CONFUSION
    path.write_bytes(pickle.dumps(Malicious(trace)))
    with pytest.raises(ValueError, match="conf_mat.pkl cannot be read"):
        save_overall(results, 3)
    assert not trace.exists()


def test_malicious_parcel(refuse_training, folder, trace):
    values = np.full((5, 4, 3), Malicious(trace))
    np.save(folder / "DATA" / "5.npy", values, allow_pickle=True)
    refuse_training([], "5.npy holds values of type object")
    assert not trace.exists()


class _Call:
    """Pickled as the call of a function, with a state or without."""

    def __init__(self, function: Any, arguments: tuple[Any, ...], state: Any = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


# A type of Python objects that claims to hold none: bytes read under it are followed as pointers.
LYING_TYPE = _Call(np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0))


LIES = {
    "buffer": _Call(np._core.numeric._frombuffer, (b"\x41" * 8, LYING_TYPE, (1,), "C")),
    "scalar": _Call(np._core.multiarray.scalar, (LYING_TYPE, b"\x41" * 8)),
    "state": _Call(
        np._core.multiarray._reconstruct,
        (np.ndarray, (0,), b"b"),
        (1, (1,), LYING_TYPE, False, b"\x41" * 8),
    ),
    "constructor": _Call(np.ndarray, ((1,), "O")),
    "bytes missing": _Call(
        np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), (1, (9,), np.dtype("f8"), False, b"")
    ),
    "function": os.system,
    "builtin": _Call(eval, ("1",)),
    "method": _Call(getattr, (np.ndarray, "tofile")),
}


@pytest.mark.parametrize("case", LIES)
def test_arrays_are_not_what_a_pickle_claims(tmp_path, case):
    """What is not refused here would crash the process, or worse."""
    (tmp_path / "array.pkl").write_bytes(pickle.dumps(LIES[case]))
    with pytest.raises(ValueError, match=r"array\.pkl cannot be read"):
        load_arrays(tmp_path / "array.pkl")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_honest_pickles_are_read(tmp_path, protocol):
    values = (np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)))
    plain = [np.float64(3.5), np.int32(-1), {"a": (1, 2.5, "text", None, True)}, np.ones(2, bool)[::2]]
    (tmp_path / "array.pkl").write_bytes(pickle.dumps([*values, *plain], protocol))
    found = load_arrays(tmp_path / "array.pkl")
    for one, other in zip(found, [*values, *plain], strict=True):
        np.testing.assert_equal(one, other)
        if isinstance(other, np.ndarray | np.generic):
            assert one.dtype.newbyteorder("=") == other.dtype.newbyteorder("=")


# --------------------------------------------------------------------------------------------- as a user runs it


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ["train.py", "--dataset_folder", "{folder}", "--res_dir", "{out}", "--mlp2", "[100,128]"],
            "start mlp2 with 132",
        ),
        (["train.py", "--dataset_folder", "{out}", "--res_dir", "{out}"], "contains no folder DATA"),
        (["inference.py", "--dataset_folder", "{folder}", "--weight_dir", "{folder}"], "holds no Fold_k"),
    ],
)
def test_commands(folder, tmp_path, arguments, words):
    places = {"folder": folder, "out": tmp_path / "out"}
    script, *rest = (argument.format(**places) for argument in arguments)
    command = [sys.executable, ROOT / script, *rest]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    check_refusal((found.returncode, found.stdout, found.stderr), words)
    assert not list(tmp_path.rglob("Fold_*"))
