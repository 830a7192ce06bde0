"""Exported models: what other programs compute with them against our own predictions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.torch_version import TorchVersion

from data.batch import Series
from data.settings import CLASSES_20
from dataset import PixelSetData
from learning.results import load_normalisation
from learning.run import open_run
from models.ensemble import Ensemble
from models.stclassifier import PseLTae
from reports.export import Exported, check_export
from tests.commands import run_inference, run_train
from tests.folders import write_folder, write_meta

NEW_TORCH = pytest.mark.skipif(
    torch.__version__ < TorchVersion("2.13"), reason="older versions cannot export torch.while_loop"
)
SMALL = "--epochs 1 --n_head 4 --mlp3 [64,32]"


def train_set(root: Path, options: str, varying: bool = False, extra_size: int = 4) -> tuple[Path, Path]:
    """A folder, with dates of its own for each parcel if asked for, and a run on it."""
    folder = write_folder(root / "set", n_parcels=9, dtype=np.float32, extra_size=extra_size)
    if varying:
        start, random = np.datetime64("2019-11-20"), np.random.default_rng(2)
        days = {
            str(i): (start + np.sort(random.integers(0, 200, 5))).astype(str).tolist() for i in range(1, 10)
        }
        write_meta(folder, "dates", days)
        pixels = np.load(folder / "DATA" / "4.npy")
        pixels[2] = np.nan
        np.save(folder / "DATA" / "4.npy", pixels)
    with pytest.MonkeyPatch.context() as monkeypatch:
        return folder, run_train(folder, root / "res", options, monkeypatch)


def export(folder: Path, weights: Path, path: Path, fold: str = "all") -> Path:
    """Exports by the command line; skips the test where what ONNX needs is not installed."""
    if path.suffix == ".onnx":
        pytest.importorskip("onnxscript", reason="requirements-export.txt is not installed")
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_inference(folder, weights, path.parent / "out", f"--export {path} --fold {fold}", monkeypatch)
    assert not (path.parent / "out").exists()
    return path


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return train_set(tmp_path_factory.mktemp("fixed"), SMALL)


@pytest.fixture(scope="module")
def pt2(fixed: tuple[Path, Path]) -> Path:
    return export(*fixed, fixed[0].parent / "model.pt2")


@pytest.fixture(scope="module")
def onnx_file(fixed: tuple[Path, Path]) -> Path:
    return export(*fixed, fixed[0].parent / "model.onnx")


def compare(path: Path, folder: Path, weights: Path, fold: str) -> list[str]:
    """Compares log-probabilities of a file, from the values of DATA, with our prediction; returns its inputs' names."""
    config = json.loads((weights / "conf.json").read_text())
    norm, extra_norm = load_normalisation(weights)
    extra = "geomfeat" if config["n_extra"] else None
    data = PixelSetData(folder, None, 6, norm=norm, extra_feature=extra, extra_stats=extra_norm).evaluation(1)
    x, _ = data.batch(range(len(data)))
    ensemble = open_run(weights).load(fold, "cpu")
    raw = (
        PixelSetData(folder, None, 6).evaluation(1).batch(range(len(data)))[0]
    )  # neither normalised nor scaled
    inputs = {"pixels": raw[0], "mask": raw[1]}
    if extra:
        features = json.loads((folder / "META" / "geomfeat.json").read_text())
        inputs["extra"] = torch.tensor([features[parcel] for parcel in data.pid], dtype=torch.float32)
    if data.varying:
        inputs["days"] = raw.days
    if path.suffix == ".pt2":
        model = torch.export.load(path).module()

        def predict(*values: torch.Tensor) -> np.ndarray:
            return model(*values).detach().numpy()

    else:
        onnxruntime = pytest.importorskip("onnxruntime", reason="requirements-export.txt is not installed")
        session = onnxruntime.InferenceSession(path)
        assert [entry.name for entry in session.get_inputs()] == list(inputs)

        def predict(*values: torch.Tensor) -> np.ndarray:
            named = {name: value.contiguous().numpy() for name, value in zip(inputs, values)}
            return session.run(None, named)[0]

    def assert_same(found: np.ndarray, x: object) -> None:
        # far from 0, a logarithm has fewer decimals
        np.testing.assert_allclose(found, ensemble(x).numpy(), atol=1e-5, rtol=1e-5)

    assert_same(predict(*inputs.values()), x)
    # Another number of parcels and pixels, and of dates where these vary.
    one = [value[:1, ..., :1] if name in ("pixels", "mask") else value[:1] for name, value in inputs.items()]
    assert predict(*one).shape == (1, config["num_classes"])
    if data.varying:
        few = [value if name == "extra" else value[:, :3] for name, value in inputs.items()]
        assert_same(predict(*few), Series(*(None if value is None else value[:, :3] for value in x)))
    return list(inputs)


def test_ltae_as_onnx(fixed: tuple[Path, Path], onnx_file: Path, tmp_path: Path) -> None:
    assert compare(onnx_file, *fixed, "all") == ["pixels", "mask", "extra"]


def test_ltae_as_pt2(fixed: tuple[Path, Path], pt2: Path, tmp_path: Path) -> None:
    compare(pt2, *fixed, "all")
    compare(export(*fixed, tmp_path / "fold.pt2", "2"), *fixed, "2")


@pytest.mark.parametrize(
    ("options", "varying", "suffix"),
    [
        (SMALL, True, ".onnx"),
        ("--tae --n_head 2 --mlp3 [64,32] --d_model 32", True, ".pt2"),
        ("--gru --hidden_dim 32", False, ".pt2"),
        pytest.param("--gru --hidden_dim 32", True, ".pt2", marks=NEW_TORCH),
        pytest.param("--gru --hidden_dim 32", True, ".onnx", marks=NEW_TORCH),
        ("--tcnn", False, ".onnx"),
        ("--tcnn --nker [8,8] --mlp3 [16] --grid_days 30", True, ".onnx"),
    ],
)
def test_other_models(options: str, varying: bool, suffix: str, tmp_path: Path) -> None:
    folder, weights = train_set(tmp_path, f"--epochs 1 {options}", varying, extra_size=0)
    names = compare(export(folder, weights, tmp_path / f"model{suffix}", "1"), folder, weights, "1")
    assert names == (["pixels", "mask", "days"] if varying else ["pixels", "mask"])


def test_absent_dates_have_no_influence_and_no_date_is_undefined() -> None:
    torch.manual_seed(0)
    members = [PseLTae(4, [4, 8], mlp2=[16, 16], with_extra=False, extra_size=0, n_head=4, d_model=None,
                       mlp3=[16, 8], len_max_seq=None, positions="days", mlp4=[8, 3])]  # fmt: skip
    model = Exported(Ensemble(members), False, True, None, None)
    pixels, mask, days = torch.randn(2, 5, 4, 6), torch.ones(2, 5, 6), torch.arange(10.0).view(2, 5)
    mask[0, 2], mask[1] = 0, 0
    result = model(pixels, mask, days)
    kept = [0, 1, 3, 4]
    alone = model(pixels[:1, kept], mask[:1, kept], days[:1, kept])
    torch.testing.assert_close(result[:1], alone, atol=1e-6, rtol=0)
    assert result[1].isnan().all()


def test_pt2_says_what_the_model_is(pt2: Path) -> None:
    extra = {"about.json": ""}
    torch.export.load(pt2, extra_files=extra)
    about = json.loads(extra["about.json"])
    assert json.loads(about["classes"]) == ["1", "3", "9"] and about["classifier"] == "PseLTae"


def test_onnx_says_what_the_model_is(onnx_file: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="requirements-export.txt is not installed")
    about = {entry.key: entry.value for entry in onnx.load(onnx_file).metadata_props}
    assert json.loads(about["classes"]) == ["1", "3", "9"] and json.loads(about["members"]) == 3


def test_published_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    published = PseLTae(positions=list(range(24)))
    (tmp_path / "Fold_1").mkdir()
    weights = {"epoch": 1, "state_dict": published.state_dict(), "optimizer": {}}
    torch.save(weights, tmp_path / "Fold_1" / "model.pth.tar")
    run_inference(tmp_path, tmp_path, tmp_path / "out", f"--export {tmp_path / 'model.pt2'}", monkeypatch)
    assert "already normalised" in capsys.readouterr().out
    x, mask, extra = torch.randn(3, 24, 10, 5), torch.ones(3, 24, 5), torch.randn(3, 4)
    result = torch.export.load(tmp_path / "model.pt2").module()(x, mask, extra)
    ours = published.eval()(((x, mask), extra.unsqueeze(1).expand(-1, 24, -1))).log_softmax(1)
    torch.testing.assert_close(result, ours, atol=1e-5, rtol=0)
    assert result.shape[1] == len(CLASSES_20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--export model.h5", "end it with .onnx or .pt2"),
        ("--export model.pt2 --n_head 8", "leave --n_head out"),
        ("--export model.pt2 --preset LTAE/9k", "leave --preset out"),
        ("--export model.pt2 --fold 7", "holds no fold 7"),
        ("--export no/such/folder/model.pt2", "there is no folder no/such/folder"),
    ],
)
def test_wrong_input(
    options: str,
    message: str,
    fixed: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        run_inference(*fixed, tmp_path / "out", options, monkeypatch)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ValueError, match="ONNX needs the packages of requirements-export.txt"):
        check_export(Path("model.onnx"))


def test_a_model_that_this_pytorch_cannot_export(
    fixed: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such operation\nand more")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(SystemExit, match="2"):
        run_inference(*fixed, tmp_path / "out", f"--export {tmp_path / 'model.pt2'}", monkeypatch)
    said = capsys.readouterr().err
    assert "cannot export this PseLTae" in said and "no such operation" in said and "and more" not in said
    assert not list(tmp_path.iterdir())
