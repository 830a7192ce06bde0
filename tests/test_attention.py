"""What the heads look at: means against plain loops over parcels, and the files of inference.py --attention."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from data.samplers import BatchSampler
from dataset import PixelSetData, batch_loader
from models.stclassifier import Ensemble, PseGru, PseLTae, PseLTae_pretrained
from reports.attention import bin_starts, choose_bands, first_day, mean_attention
from reports.plots import cell_edges
from tests.commands import run_inference, run_train
from tests.folders import NOMENCLATURE, write_folder, write_meta

DAYS = [0, 11, 22, 33, 44]
BANDS = (1, 3)
NORM = np.linspace(50, 80, 20).reshape(5, 4), np.linspace(20, 90, 20).reshape(5, 4)


def ensemble(positions: list[int] | str, n_dates: int | None) -> Ensemble:
    """Two L-TAEs whose attention is far from even."""
    torch.manual_seed(3)
    members = []
    for _ in range(2):
        member = PseLTae(
            4, [4, 8], "mean_std", [16, 16], False, 0, n_head=4, d_k=4, d_model=16, mlp3=[16, 8],
            len_max_seq=n_dates, positions=positions, mlp4=[8, 3],
        )  # fmt: skip
        member.temporal_encoder.attention_heads.Q.data *= 5
        members.append(member)
    return Ensemble(members)


def means(model: Ensemble, data: PixelSetData, groups: np.ndarray, bands: tuple[int, int] | None = BANDS):
    loader = batch_loader(data, BatchSampler(range(len(data)), 4), 0)
    return mean_attention(model, data, loader, groups, 3, bands, torch.device("cpu"))


def ndvi(values: np.ndarray) -> np.ndarray:
    """NDVI (T,) of a parcel's raw pixels (T, C, S)."""
    red, nir = (values[:, band].astype(float).mean(1) for band in BANDS)
    return (nir - red) / (nir + red)


def test_shared_dates(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", n_parcels=10, sizes=[1, 3, 4, 5, 6, 2, 2, 0, 5, 4])
    data = PixelSetData(folder, NOMENCLATURE, 6, [1, 3, 9], NORM).evaluation(1)
    groups = data.target.copy()
    groups[groups == 2] = -1  # a class that nobody has
    model = ensemble(DAYS, 5)
    result = means(model, data, groups)
    assert bin_starts(data).tolist() == DAYS and first_day(data) == np.datetime64("2017-01-03")

    for k in (0, 1):
        members = [i for i in range(10) if groups[i] == k]
        one_by_one = [model.attention(data.batch([i])[0])[:, :, 0].double() for i in members]
        np.testing.assert_allclose(result.weight[:, k], torch.stack(one_by_one).mean(0), atol=1e-6)
        files = [np.load(folder / "DATA" / f"{data.pid[i]}.npy") for i in members]
        series = np.array([ndvi(values) for values in files if values.shape[2]])
        np.testing.assert_allclose(result.ndvi[k], series.mean(0), atol=1e-5)
        np.testing.assert_allclose(result.ndvi_std[k], series.std(0), atol=1e-4)
        assert result.parcels[k] == len(members)
    np.testing.assert_allclose(result.weight[:, :2].sum(-1), 1, atol=1e-6)
    assert np.ptp(result.weight[0, 0]) > 0.05  # not even
    assert np.isnan(result.weight[:, 2]).all() and np.isnan(result.ndvi[2]).all()
    assert np.isnan(means(model, data, groups, bands=None).ndvi).all()


def test_dates_per_parcel_are_put_into_weeks(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", n_parcels=9, n_dates=4, sizes=[3] * 9, dtype=np.float32)
    random = np.random.default_rng(5)
    start = np.datetime64("2019-11-20")
    days = {i: np.sort(random.integers(0, 40, 4)) for i in range(1, 10)}
    days[1][0] = 0
    write_meta(folder, "dates", {str(i): (start + own).astype(str).tolist() for i, own in days.items()})
    pixels = np.load(folder / "DATA" / "2.npy")
    pixels[1] = np.nan  # a date that is not there
    np.save(folder / "DATA" / "2.npy", pixels)
    norm = NORM[0][0], NORM[1][0]
    data = PixelSetData(folder, NOMENCLATURE, 3, [1, 3, 9], norm).evaluation(1)
    assert data.varying and first_day(data) == start
    model = ensemble("days", None)
    result = means(model, data, data.target)

    T = -(-(int(max(own.max() for own in days.values())) + 1) // 7)
    assert bin_starts(data).tolist() == list(range(0, 7 * T, 7))
    weight, total, count = np.zeros((2, 3, 4, T)), np.zeros((3, T)), np.zeros((3, T))
    for i, own in days.items():
        k, values = (i - 1) % 3, np.load(folder / "DATA" / f"{i}.npy")
        kept = [t for t in range(4) if not np.isnan(values[t]).all()]
        attention = model.attention(data.batch([i - 1])[0])[:, :, 0].numpy()
        for place, t in enumerate(kept):
            weight[:, k, :, own[t] // 7] += attention[:, :, place] / 3  # three parcels in each class
            total[k, own[t] // 7] += ndvi(values)[t]
            count[k, own[t] // 7] += 1
    np.testing.assert_allclose(result.weight, weight, atol=1e-6)
    np.testing.assert_array_equal(result.observed, count)
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(result.ndvi, total / count, atol=1e-5)


def test_attention_does_not_depend_on_return_att() -> None:
    x = torch.randn(3, 5, 4, 6), torch.ones(3, 5, 6)
    member = ensemble(DAYS, 5).members[0]
    attention = member.attention(x)
    assert isinstance(member(x), torch.Tensor)
    member.temporal_encoder.return_att = True
    logits, returned = member(x)
    assert torch.equal(attention, returned) and torch.equal(member.decoder(member.embed(x)), logits)
    with pytest.raises(ValueError, match="PseGru has no attention"):
        PseGru(4, [4, 8], mlp2=[16, 16], with_extra=False, extra_size=0).attention(x)


@pytest.mark.parametrize(
    "names, expected",
    [
        (["B8", "B3", "B4"], (2, 0)),
        (["B02", "B04", "B08", "B8A"], (1, 2)),
        (["blue", "red", "nir"], (1, 2)),
        (["b8a", "red"], (1, 0)),
        (["B8A", "NIR", "B04"], (2, 1)),  # the wide band before the narrow one
        (["nir08", "RED"], (1, 0)),
        ([], None),
        (["VV", "VH"], None),
        (["red", "green"], None),
    ],
)
def test_bands_are_known_by_their_usual_names(names: list[str], expected: tuple[int, int] | None) -> None:
    assert choose_bands(None, names, len(names) or 4) == expected


def test_bands() -> None:
    names = ["B8", "B3", "B4"]
    assert choose_bands(["0", "2"], [], 3) == (0, 2)
    assert choose_bands(["B04", "b08"], names, 3) == (2, 0)
    assert choose_bands(["2", "B3"], names, 3) == (2, 1)
    assert choose_bands(None, [], 10) == (2, 6)
    assert choose_bands(None, ["VV"] * 10, 10) is None
    for asked in (["1", "3"], ["B4", "B9"], ["-1", "0"]):
        with pytest.raises(UserError, match=rf"--ndvi_bands is {' '.join(asked)} .* 0 to 2.*B8, B3, B4"):
            choose_bands(asked, names, 3)
    with pytest.raises(UserError, match="--ndvi_bands is B4 B8 .* 0 to 3"):
        choose_bands(["B4", "B8"], [], 4)


def test_cells_reach_half_way_to_the_next_date() -> None:
    assert cell_edges(np.array([0, 10, 14]), None).tolist() == [-5, 5, 12, 16]
    assert cell_edges(np.array([3.0]), None).tolist() == [2.5, 3.5]
    assert cell_edges(np.array([0, 7]), 7).tolist() == [0, 7, 14]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = write_folder(
        tmp_path_factory.mktemp("data") / "set", n_parcels=15, classes=("../wheat", "maize", "é")
    )
    write_meta(folder, "info", {"bands": ["B02", "B03", "B04", "B08"]})
    names = {"maize": "grain maize"}
    write_meta(folder, "classes", {NOMENCLATURE: names})
    with pytest.MonkeyPatch.context() as monkeypatch:
        results = tmp_path_factory.mktemp("run") / "res"
        return folder, run_train(folder, results, "--epochs 1 --n_head 4 --mlp3 [64,32]", monkeypatch)


def test_command(run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, weights = run
    output = run_inference(
        folder, weights, tmp_path / "out", "--attention --ndvi_bands B4 B08 --fold 2", monkeypatch
    )
    with np.load(output / "attention.npz") as arrays:
        assert arrays["weight"].shape == (1, 3, 4, 5) and arrays["folds"].tolist() == [2]
        np.testing.assert_allclose(arrays["weight"].sum(-1), 1, atol=1e-5)
        assert np.isfinite(arrays["ndvi"]).all() and arrays["parcels"].tolist() == [5, 5, 5]
        assert sorted(arrays["labels"]) == sorted(
            json.loads((weights / "conf.json").read_text())["sub_classes"]
        )
        assert arrays["dates"][0] == np.datetime64("2017-01-03")
    pictures = sorted(path.name for path in (output / "attention").iterdir())
    assert len(pictures) == 3 and "maize.png" in pictures
    assert not list(tmp_path.glob("*wheat*"))
    assert all((output / "attention" / name).read_bytes()[:4] == b"\x89PNG" for name in pictures)


def test_without_labels_the_predicted_classes_are_taken(
    run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = write_folder(tmp_path / "new", n_parcels=6)
    (folder / "META" / "labels.json").unlink()
    output = run_inference(folder, run[1], tmp_path / "out", "--attention", monkeypatch)
    assert "Attention by predicted class" in capsys.readouterr().out
    predicted = np.load(output / "Predictions_id_ytrue_y_pred.npy")[:, 2]
    with np.load(output / "attention.npz") as arrays:
        assert arrays["parcels"].tolist() == np.bincount(predicted, minlength=3).tolist()
        assert np.isnan(arrays["ndvi"]).all()  # nothing tells which of 4 channels are red and infrared


def test_encoders_without_attention_are_refused(
    run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    results = run_train(run[0], tmp_path / "gru", "--epochs 1 --gru", monkeypatch)
    with pytest.raises(SystemExit, match="2"):
        run_inference(run[0], results, tmp_path / "out", "--attention", monkeypatch)
    assert "PSE + GRU has no attention" in capsys.readouterr().err
    (results / "conf.json").unlink()  # bare weights, described by flags
    with pytest.raises(SystemExit, match="2"):
        run_inference(run[0], results, tmp_path / "out", "--attention --preset GRU/15k", monkeypatch)
    assert "PSE + GRU has no attention" in capsys.readouterr().err


def test_from_run_is_the_trained_model(run: tuple[Path, Path], tmp_path: Path) -> None:
    folder, weights = run
    model = PseLTae_pretrained.from_run(weights, device="cpu")
    config = json.loads((weights / "conf.json").read_text())
    x = ((torch.randn(4, 5, 4, 6), torch.ones(4, 5, 6)), torch.randn(4, 5, config["n_extra"]))
    assert len(model.members) == 3 and not model.train().training
    assert model.embed(x).shape == (3, 4, 32) and model.attention(x).shape == (3, 4, 4, 5)
    decoded = (
        torch.stack([m.decoder(e) for m, e in zip(model.members, model.embed(x))]).log_softmax(2).mean(0)
    )
    assert torch.equal(decoded, model(x))


def test_from_run_takes_published_defaults_without_a_configuration(tmp_path: Path) -> None:
    published = PseLTae(positions=list(range(24)))
    (tmp_path / "Fold_1").mkdir()
    torch.save(
        {"epoch": 1, "state_dict": published.state_dict(), "optimizer": {}},
        tmp_path / "Fold_1" / "model.pth.tar",
    )
    model = PseLTae_pretrained.from_run(tmp_path, 1, "cpu")
    x = ((torch.randn(2, 24, 10, 5), torch.ones(2, 24, 5)), torch.randn(2, 24, 4))
    assert torch.equal(model(x), published.eval()(x).log_softmax(1))
    with pytest.raises(ValueError, match="conf.json cannot be read|is not valid JSON"):
        (tmp_path / "conf.json").write_text("{")
        PseLTae_pretrained.from_run(tmp_path, 1, "cpu")


def test_from_run_of_another_classifier_says_which(tmp_path: Path, run: tuple[Path, Path]) -> None:
    config = json.loads((run[1] / "conf.json").read_text())
    (tmp_path / "conf.json").write_text(json.dumps(config | {"gru": True}))
    with pytest.raises(ValueError, match="load it with PseGru_pretrained.from_run"):
        PseLTae_pretrained.from_run(tmp_path)
