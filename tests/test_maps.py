"""Predictions as vector files and maps."""

import csv
import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

import inference
from common.errors import UserError
from data.outlines import to_ground
from preprocessing.parcels import read_outlines
from reports.cartography import PALETTE, colour_distances, outline_paths, scale_length
from reports.maps import DARK, GREY, class_colours, match_outlines, plot_map, write_map
from tests.commands import run_command, run_inference, run_train
from tests.folders import write_folder, write_meta
from tests.test_plots import check_texts, long_names

geopandas = pytest.importorskip("geopandas")
import shapely

from tests.outlines import write_outlines

CLASSES = ["1", "3", "9"]


def write_table(path: Path, labels: list[str], names: dict[str, str] | None = None) -> np.ndarray:
    """A table of predictions for parcels 1, 2, ...; returns the probabilities, nan for those without a label."""
    probabilities = np.random.default_rng(0).dirichlet(np.ones(len(CLASSES)), len(labels)).astype(np.float32)
    probabilities[[not label for label in labels]] = np.nan
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        header = ["id", "true_label", "predicted_label", "confidence", "agreement", "predicted_by"]
        header += ["parcel", "true_name", "predicted_name", "doubt", "set"] if names else []
        table.writerow(header + [f"probability_{label}" for label in CLASSES])
        for i, (label, each) in enumerate(zip(labels, probabilities.tolist()), start=1):
            numbers = [max(each), 0.5, *each] if label else [""] * (2 + len(each))
            told = (
                [f"0{i}", "", names.get(label, label), int(label == "1") if label else "", label]
                if names
                else []
            )
            table.writerow([i, "", label, *numbers[:2], "1", *told, *numbers[2:]])
    return probabilities


def simulate_deficiency(colours: np.ndarray, kind: str) -> np.ndarray:
    """Linear RGB as seen with a missing cone: Vienot, Brettel and Mollon, 1999."""
    to_cones = np.array(
        [[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]]
    )
    missing = {
        "protan": [[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]],
        "deutan": [[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]],
    }
    matrix = np.linalg.inv(to_cones) @ np.array(missing.get(kind, np.eye(3))) @ to_cones
    return np.clip(colours @ matrix.T, 0, 1)


def to_lab(linear: np.ndarray) -> np.ndarray:
    """CIELAB of linear sRGB, white D65."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = linear @ np.array(to_xyz).T / [0.9505, 1, 1.089]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


@pytest.mark.parametrize("kind, least", [("normal", 22), ("protan", 13), ("deutan", 13)])
def test_colours_can_be_told_apart(kind: str, least: float) -> None:
    colours = np.array([matplotlib.colors.to_rgb(colour) for colour in [*PALETTE, GREY, DARK, "white"]])
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    lab = to_lab(simulate_deficiency(linear, kind))
    distances = np.linalg.norm(lab[:, None] - lab, axis=2)
    if kind == "normal":
        np.testing.assert_allclose(colour_distances(), distances[: len(PALETTE), : len(PALETTE)], rtol=1e-4)
    assert distances[np.triu_indices(len(lab), 1)].min() > least


def test_a_class_has_the_same_colour_on_every_map() -> None:
    classes = [str(code) for code in range(20)]
    assert class_colours(["4", "2", "2", ""], classes) == {"2": PALETTE[2], "4": PALETTE[4]}
    assert class_colours(classes, classes) == dict(zip(classes, PALETTE))
    many = [str(code) for code in range(44)]
    assert class_colours(["40", "3"], many) == {"3": PALETTE[3], "40": PALETTE[0]}
    assert len(set(class_colours(["0", "20", "40"], many).values())) == 3


@pytest.mark.parametrize("n", [4, 20, 44])
def test_classes_that_are_confused_have_unlike_colours(n: int) -> None:
    """In the mean over what is confused, they are less alike than by their places; the same whatever else occurs."""
    classes, random = [str(code) for code in range(n)], np.random.default_rng(n)
    confusion = 1000 * np.eye(n, dtype=int)
    for a, b in random.permutation(n).reshape(-1, 2):
        confusion[a, b] = confusion[b, a] = random.integers(100, 900)
    labels = classes[: len(PALETTE)]
    distance = {
        (a, b): colour_distances()[i, j] for i, a in enumerate(PALETTE) for j, b in enumerate(PALETTE)
    }

    def mean_distance(colours: dict[str, str]) -> float:
        pairs = [(a, b) for a in labels for b in labels if a != b and confusion[int(a), int(b)]]
        return np.mean([distance[colours[a], colours[b]] for a, b in pairs])

    colours = class_colours(labels, classes, confusion)
    assert len(set(colours.values())) == len(labels)
    assert mean_distance(colours) > 1.2 * mean_distance(class_colours(labels, classes))
    if n <= len(PALETTE):
        assert class_colours(labels[:2], classes, confusion).items() <= colours.items()


def test_rare_classes_are_pooled() -> None:
    many = [str(code) for code in range(44)]
    labels = [label for label in many for _ in range(50 - int(label))]
    colours = class_colours(labels, many)
    assert list(colours) == many  # the most frequent first
    assert len({colours[label] for label in many[:19]}) == 19
    assert {colours[label] for label in many[19:]} == {DARK}


def test_outlines_keep_holes_and_pieces() -> None:
    ring = shapely.Point(0, 0).buffer(10).difference(shapely.Point(0, 0).buffer(5))
    pieces = shapely.union_all([shapely.box(20, 0, 25, 5), shapely.box(30, 0, 35, 5)])
    twisted = shapely.Polygon(
        ring.exterior.coords, [ring.interiors[0].coords[::-1]]
    )  # both rings the same way
    paths = outline_paths(geopandas.GeoSeries([ring, pieces, twisted]))
    for path, shape in zip(paths, [ring, pieces, twisted]):
        signed = [shoelace(points) for points in path.to_polygons()]
        assert len(signed) == 2 and abs(sum(signed)) == pytest.approx(
            shape.area
        )  # a ring that runs the other way is a hole


def shoelace(points: np.ndarray) -> float:
    """Area of a closed ring (N, 2), negative if it runs clockwise."""
    return sum(a[0] * b[1] - b[0] * a[1] for a, b in pairwise(points)) / 2


@pytest.mark.parametrize(
    "most, length", [(1000, 1000), (999, 500), (250, 200), (12_345, 10_000), (3, 2), (0.1, 1)]
)
def test_scale_bar_has_a_round_length(most: float, length: float) -> None:
    assert scale_length(most) == length


def test_writes_vector_files_with_everything(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    labels = ["3", "1", "", "9", "3"]
    probabilities = write_table(tmp_path / "predictions.csv", labels, {"3": "Maize"})
    outlines = read_outlines(write_outlines(tmp_path / "in.gpkg", [4, 3, 2, 1, 77]))
    matched = match_outlines(outlines, ["1", "2", "3", "4", "5"])
    said = capsys.readouterr().out
    assert "1 of 5 parcels have none" in said and "Outlines: 1 are of no parcel" in said
    written = write_map(matched, tmp_path / "predictions.csv", tmp_path)
    assert written == [tmp_path / f"predictions.{kind}" for kind in ("gpkg", "parquet", "qml")]
    for frame in (geopandas.read_file(written[0]), geopandas.read_parquet(written[1])):
        assert frame["parcel"].tolist() == ["04", "03", "02", "01"] and frame["set"].tolist() == [
            "9",
            "",
            "1",
            "3",
        ]
        assert frame["doubt"].fillna(-1).tolist() == [0, -1, 1, 0] and set(frame["predicted_by"]) == {"1"}
        assert frame.crs == outlines.crs and frame["id"].tolist() == [4, 3, 2, 1]
        assert frame["predicted_label"].tolist() == ["9", "", "1", "3"]
        assert frame["predicted_name"].tolist() == ["9", "", "1", "Maize"]
        columns = [f"probability_{label}" for label in CLASSES]
        np.testing.assert_allclose(frame[columns], probabilities[[3, 2, 1, 0]], rtol=1e-5)
        np.testing.assert_allclose(frame["confidence"], probabilities[[3, 2, 1, 0]].max(1), rtol=1e-5)
        expected = read_outlines(tmp_path / "in.gpkg").set_index("id").loc[[4, 3, 2, 1]].geometry
        assert frame.geometry.area.tolist() == pytest.approx(expected.area.tolist())
    assert not list(tmp_path.glob(".*"))


def test_labels_may_differ_in_case_alone(tmp_path: Path) -> None:
    with open(tmp_path / "predictions.csv", "w", newline="", encoding="utf-8") as file:
        columns = [
            "id",
            "true_label",
            "predicted_label",
            "confidence",
            "agreement",
            "probability_a",
            "probability_A",
        ]
        csv.writer(file).writerows([columns, [1, "", "A", 0.7, 1, 0.3, 0.7], [2, "", "", "", "", "", ""]])
    outlines = read_outlines(write_outlines(tmp_path / "in.gpkg", [1, 2]))
    first, second, _ = write_map(outlines, tmp_path / "predictions.csv", tmp_path)
    frame = geopandas.read_file(first)
    assert frame["probability_A_"][0] == 0.7 and frame["predicted_label"].tolist() == ["A", ""]
    assert geopandas.read_parquet(second)["probability_A"][0] == 0.7


def test_draws_every_parcel_in_its_colour(tmp_path: Path) -> None:
    labels = ["3", "1", "", "9"] * 5
    write_table(tmp_path / "predictions.csv", labels, {"3": "$5 <maize>"})
    outlines = read_outlines(write_outlines(tmp_path / "in.gpkg", range(1, 21), crs=4326))
    (*_, style, picture) = write_map(outlines, tmp_path / "predictions.csv", tmp_path, tmp_path / "m.png")
    image = matplotlib.image.imread(picture)[..., :3]
    assert image.shape[1] == 2200
    panel = image[: image.shape[0] * 2 // 5]
    for colour in (PALETTE[0], PALETTE[1], PALETTE[2], GREY):
        near = np.abs(panel - matplotlib.colors.to_rgb(colour)).max(2) < 0.01
        squares = 5 * 100 * 100 / (1188 * 220) / (1.06 * 1.2)  # their share of the panel, roughly
        assert 0.3 * squares < near.mean() < squares
    assert read_style(style) == {
        "1": ("1", PALETTE[0]),
        "3": ("$5 <maize>", PALETTE[1]),
        "9": ("9", PALETTE[2]),
        "": ("no observation", GREY),
    }


def read_style(path: Path) -> dict[str, tuple[str, str]]:
    """Name and colour of each label in a QGIS style."""
    root = ElementTree.parse(path).getroot()
    renderer = root.find("renderer-v2[@type='categorizedSymbol']")
    assert root.tag == "qgis" and renderer.get("attr") == "predicted_label"
    found = {}
    for category in renderer.iter("category"):
        fills = renderer.findall(
            f"symbols/symbol[@name='{category.get('symbol')}']/layer[@class='SimpleFill']"
        )
        (colour,) = (
            prop.get("v") for fill in fills for prop in fill.iter("prop") if prop.get("k") == "color"
        )
        red, green, blue, alpha = map(int, colour.split(","))
        assert alpha == 255
        found[category.get("value")] = category.get("label"), f"#{red:02x}{green:02x}{blue:02x}"
    return found


@pytest.mark.parametrize("n", [4, 20, 44])
@pytest.mark.parametrize("size", [(6000, 5000), (20_000, 3000), (2000, 15_000), (100, 100)])
def test_map_has_no_empty_band_and_legible_texts(n: int, size: tuple[int, int], tmp_path: Path) -> None:
    names, corners = long_names(n), np.random.default_rng(0).uniform(0, 1, (n, 2)) * size
    corners[:2] = (0, 0), size
    frame = to_ground(read_outlines(write_outlines(tmp_path / "in.gpkg", range(n), corners.tolist())))
    frame["predicted_label"], frame["confidence"] = list(names), 0.5
    frame["predicted_name"] = list(names.values())
    figure = plot_map(frame, list(names), "a dataset, 2017-01-03 to 2017-10-14")
    panels = figure.axes[:2]
    check_texts(
        figure, [figure._suptitle, *(panel.title for panel in panels), *figure.legends[0].findobj(Text)]
    )
    FigureCanvasAgg(figure).draw()
    frames = [panel.get_window_extent() for panel in panels]
    beside, rest = (
        abs(frames[0].y0 - frames[1].y0) < 1,
        figure.bbox.height - figure.legends[0].get_window_extent().height,
    )
    assert (max if beside else sum)(box.height for box in frames) > rest - (
        1.1 if beside else 1.5
    ) * figure.dpi
    for panel in panels:  # what is shown fills its panel
        west, east = panel.get_xlim()
        assert east - west < 1.25 * (size[0] + 100) or size[0] < size[1]


def test_neighbours_of_a_class_are_outlined(tmp_path: Path) -> None:
    corners = [(x, y) for x in (0, 100, 200) for y in (0, 100, 200)]  # without gaps
    frame = to_ground(read_outlines(write_outlines(tmp_path / "in.gpkg", range(9), corners)))
    frame["predicted_label"], frame["predicted_name"], frame["confidence"] = "1", "Wheat", 0.5
    figure = plot_map(frame, CLASSES)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    middle = figure.axes[0].get_window_extent()
    row = np.asarray(canvas.buffer_rgba())[int(figure.bbox.height - middle.y1 + 0.25 * middle.height)] / 255
    dark = row[int(middle.x0 + 3) : int(middle.x1 - 3), :3].max(1) < 0.6
    assert 3 <= np.count_nonzero(np.diff(dark.astype(int)) == 1) <= 4  # left, right and two edges between


def test_confidence_panel_and_legend(tmp_path: Path) -> None:
    frame = to_ground(
        read_outlines(
            write_outlines(tmp_path / "in.gpkg", range(1, 5), [(0, 0), (0, 900), (900, 0), (900, 900)])
        )
    )
    frame["predicted_label"], frame["confidence"] = ["3", "1", "", "3"], [0.2, 0.4, np.nan, 0.9]
    frame["predicted_name"] = ["Maize", "Wheat", "", "Maize"]
    figure = plot_map(frame, CLASSES)
    confidence = figure.axes[1].collections[1]
    assert confidence.get_array().tolist() == [0.2, 0.4, 0.9] and confidence.get_clim() == (0, 1)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "Maize (2)",
        "Wheat (1)",
        "no observation (1)",
    ]
    west, east = figure.axes[0].get_xlim()
    assert 1000 < east - west < 1100  # metres


def test_inference_draws_the_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = write_folder(tmp_path / "set", n_parcels=18)
    write_meta(folder, "classes", {"label_44class": {"1": "Wheat", "3": "Maize", "9": "Beet"}})
    write_outlines(folder / "META" / "parcels.gpkg", range(1, 18))
    weights = run_train(folder, tmp_path / "res", "--epochs 1", monkeypatch)
    capsys.readouterr()
    output = run_inference(folder, weights, tmp_path / "out", f"--map {tmp_path / 'map.png'}", monkeypatch)
    said = capsys.readouterr().out
    assert "1 of 18 parcels have none" in said and f"{output / 'predictions.gpkg'}" in said
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    frame = geopandas.read_file(output / "predictions.gpkg").set_index("id")
    with open(output / "predictions.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(frame) == 17
    for row in rows[:17]:
        found = frame.loc[int(row["id"])]
        assert found["predicted_label"] == row["predicted_label"]
        assert found["predicted_name"] == {"1": "Wheat", "3": "Maize", "9": "Beet"}[row["predicted_label"]]
        assert found["confidence"] == pytest.approx(float(row["confidence"]))
    assert json.loads((weights / "conf.json").read_text())["class_names"]["9"] == "Beet"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = write_folder(tmp_path_factory.mktemp("data") / "set")
    write_outlines(folder / "META" / "parcels.gpkg", range(1, 13))
    write_outlines(folder / "unplaced.gpkg", range(1, 13), crs=None)
    write_outlines(folder / "text.gpkg", [f"A{i}" for i in range(12)])
    write_outlines(folder / "others.gpkg", range(50, 62))
    with pytest.MonkeyPatch.context() as monkeypatch:
        return folder, run_train(folder, folder.parent / "res", "--epochs 1", monkeypatch)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--map map.txt", "map.txt does not end as a picture does"),
        ("--map nowhere/map.png", "nowhere is not a folder"),
        ("--parcels {0}/missing.gpkg", "missing.gpkg does not exist"),
        ("--parcels {0}/META/labels.json", "labels.json cannot be read"),
        ("--parcels {0}/META/parcels.gpkg --id_column nr", "has no column 'nr'"),
        ("--parcels {0}/unplaced.gpkg", "has no coordinate system"),
        ("--parcels {0}/text.gpkg", "column 'id' holds ids such as 'A0'; expected the dataset's"),
        ("--parcels {0}/others.gpkg", "no outline is of one of the 12 parcels: its ids are such as 50"),
    ],
)
def test_wrong_input_stops_before_predicting(
    options: str,
    message: str,
    trained: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(inference, "predict", lambda *args: pytest.fail("predicted first"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run_inference(*trained, tmp_path / "out", options.format(trained[0]), monkeypatch)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1


def test_the_outlines_are_those_of_the_dataset_that_is_predicted(
    tmp_path: Path, trained: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Which is that of the run, unless another is named; the embedded one has none."""
    results = Path(shutil.copytree(trained[1], tmp_path / "results"))
    command = f"--weight_dir {results} --output_dir {tmp_path / 'out'} --map {tmp_path / 'm.png'}"
    run_command(inference.main, command, monkeypatch)
    assert (tmp_path / "m.png").exists()
    config = json.loads((results / "conf.json").read_text())
    bare = Path(shutil.copytree(trained[0], tmp_path / "bare"))
    (bare / "META" / "parcels.gpkg").unlink()
    changed = config | {"simulated": True, "dataset_folder": str(bare)}
    (results / "conf.json").write_text(json.dumps(changed))
    with pytest.raises(SystemExit):
        run_command(inference.main, command, monkeypatch)
    assert "--map needs outlines" in capsys.readouterr().err


def test_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "geopandas", None)
    with pytest.raises(UserError, match=r"need geopandas, .* pip install -r requirements-geo\.txt"):
        read_outlines(tmp_path / "parcels.gpkg")
