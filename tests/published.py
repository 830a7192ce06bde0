"""Tiny folders in the layouts of published datasets, with random values, for tests."""

import csv
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a CSV file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def write_pastis(folder: Path) -> dict[int, dict[str, np.ndarray]]:
    """PASTIS-R: parcels 10 to 19, two per fold, in the patches 7 and 8; arrays by parcel and satellite.

    Patch 7 lists a day of S2 twice, of which the arrays have one, and its keys in another order. Parcel 19 is void and
    has no pixels.
    """
    random = np.random.default_rng(1)
    days = {
        7: {"S2": {"0": 20180917, "2": 20181007, "1": 20181007, "3": 20190101}, "S1A": {"0": 20180902}},
        8: {
            "S2": json.dumps({str(t): 20181001 + t for t in range(12)}),
            "S1A": '{"0": 20180901, "1": 20180902}',
        },
    }
    features = [
        {"type": "Feature", "properties": {"ID_PATCH": patch} | {f"dates-{sat}": own[sat] for sat in own}}
        for patch, own in days.items()
    ]
    folder.mkdir(parents=True)
    (folder / "metadata.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    arrays, rows = {}, []
    for i in range(10):
        name, patch = 10 + i, 7 + i % 2
        size = 0 if i == 9 else 2 + i
        arrays[name] = {
            "S2": random.integers(1, 9999, (3 if patch == 7 else 12, 10, size)).astype(np.int16),
            "S1A": random.normal(-10, 3, (1 if patch == 7 else 2, 3, size)).astype(np.float16),
        }
        for satellite, values in arrays[name].items():
            (folder / f"DATA_{satellite}").mkdir(exist_ok=True)
            np.save(folder / f"DATA_{satellite}" / f"{satellite}_{name}.npy", values)
        label = 19 if i == 9 else 1 + i % 2
        features = {"GF_Perimeter": 100.5 + i, "GF_Area": 2000 + i}
        rows.append({"ID_PARCEL": name, "ID_PATCH": patch, "Label": label, "Fold": 1 + i // 2} | features)
    write_table(folder / "metadata_parcel.csv", rows)
    norm = {f"Fold_{k}": {"mean": [k + c for c in range(10)], "std": [2 * k] * 10} for k in range(1, 6)}
    (folder / "NORM_PARCEL_S2_set.json").write_text(json.dumps(norm))
    return arrays


def write_timematch(tile: Path, labels: list[Any], clouds: bool = False) -> list[np.ndarray]:
    """A tile of TimeMatch with a parcel per label, in blocks of two; the arrays."""
    import zarr

    random, parcels, arrays = np.random.default_rng(2), [], []
    (tile / "meta").mkdir(parents=True)
    for i, label in enumerate(labels):
        values = random.integers(1, 9999, (3, 11 if clouds else 10, 2 + i)).astype(np.uint16)
        if clouds:
            values[:, 10] = 65535 * (values[:, 10] % 3 == 0)
        array = zarr.create_array(
            store=str(tile / "data" / f"{i}.zarr"), shape=values.shape, dtype=values.dtype, zarr_format=2
        )
        array[:] = values
        arrays.append(values)
        features = [np.float64(100.0 + i), np.float64(500.0), 0.2, 0.75]
        about = {"id": 1000 + i, "label": label, "n_pixels": np.int32(2 + i), "block": np.int64(i // 2)}
        parcels.append(about | {"geometric_features": features})
    meta = {"start_date": "20170101", "end_date": "20171231", "dates": [20170103, 20170602, 20171231]}
    meta |= {"cloudy_pct": [0.0, 12.5, 80.0], "parcels": parcels}
    (tile / "meta" / "metadata.pkl").write_bytes(pickle.dumps(meta))
    return arrays


def write_breizhcrops(root: Path, level: str = "L1C") -> dict[int, np.ndarray]:
    """BreizhCrops of 2017: two parcels per region, one of an unknown code in frh01; tables by parcel, days included."""
    import h5py

    random, tables = np.random.default_rng(3), {}
    classes = [(0, "barley", "ORH"), (0, "barley", "ORP"), (1, "wheat", "BTH")]
    rows = [
        {"": k, "id": label, "classname": name, "code": code} for k, (label, name, code) in enumerate(classes)
    ]
    write_table(root / "classmapping.csv", rows)
    folder = root / "2017" / level
    (root / "codes.csv").write_text("Code;Libellé\nORH;Orge\n")
    for r in range(4):
        region, rows = f"frh0{r + 1}", []
        folder.mkdir(parents=True, exist_ok=True)
        with h5py.File(folder / f"{region}.h5", "w") as file:
            for i, code in enumerate(["ORH", "BTH", "XXX"][: 3 if r == 0 else 2]):
                parcel, length = 100 * r + i + 1, 3 + i + r
                values = random.uniform(0, 10000, (length, 17 if level == "L1C" else 14))
                days = np.datetime64("2017-01-03T11:00") + 20 * np.arange(length) * np.timedelta64(1, "D")
                values[:, 16 if level == "L1C" else 0] = days.astype("datetime64[ns]").astype(np.int64)
                file.create_dataset(f"csv/{parcel}.csv", data=values)
                tables[parcel] = values
                row = {
                    "idx": i,
                    "CODE_CULTU": code,
                    "path": f"csv/{parcel}.csv",
                    "meanQA60": 0.5,
                    "id": parcel,
                }
                label = {"ORH": (0, "barley"), "BTH": (1, "wheat")}.get(code, (9, "unknown"))
                row |= {
                    "sequencelength": length,
                    "classid": label[0],
                    "classname": label[1],
                    "region": region,
                }
                rows.append(row)
        write_table(folder / f"{region}.csv", rows)
    return tables


def write_eurocropsml(root: Path) -> dict[str, dict[str, np.ndarray]]:
    """EuroCropsML: two parcels of each of three countries, the first with a date that is all -999; arrays by file."""
    random, files = np.random.default_rng(4), {}
    folder = root / "preprocess" / "S2" / "2021"
    folder.mkdir(parents=True)
    for c, region in enumerate(("EE001", "LV003", "PT11A")):
        for i, code in enumerate((3301010101, 3302000000)):
            length = 4 + c + i
            data = random.integers(0, 10000, (length, 13))
            if c == i == 0:
                data[1] = -999
            dates = np.datetime64("2021-03-01") + 7 * np.arange(length)
            name, center = f"{region}_{77 + i}_{code}", np.array([25.5, 58.5])
            np.savez(folder / f"{name}.npz", data=data, dates=dates.astype("datetime64[D]"), center=center)
            files[name] = {"data": data, "dates": dates}
    return files


def write_sits(path: Path, n: int = 6) -> list[dict[str, np.ndarray]]:
    """A sits tibble as R's save() writes it: classes, days as Date; NA in one band of the first series."""
    import pandas
    import rdata
    from rdata.conversion.to_r import DEFAULT_CLASS_MAP, RObjectType, build_r_object

    random, series = np.random.default_rng(5), []

    class Days:
        def __init__(self, values: np.ndarray) -> None:
            self.values = values

    class Tibble(dict):
        pass

    def days_to_r(days: Days, converter: Any) -> Any:
        attributes = converter.convert_to_r_attributes({"class": "Date"})
        values = days.values.astype(float)
        return build_r_object(RObjectType.REAL, value=values, is_object=True, attributes=attributes)

    def tibble_to_r(table: Tibble, converter: Any) -> Any:
        length = len(table.get("label", next(iter(table.values())).values if "Index" in table else []))
        attributes = converter.convert_to_r_attributes(
            {
                "names": np.array(list(table)),
                "class": np.array(["sits", "tbl_df", "tbl", "data.frame"]),
                "row.names": np.arange(1, length + 1, dtype=np.int32),
            }
        )
        values = [converter.convert_to_r_object(column) for column in table.values()]
        return build_r_object(RObjectType.VEC, value=values, is_object=True, attributes=attributes)

    for i in range(n):
        days = np.datetime64("2013-09-14") + 16 * np.arange(3) + 365 * (i % 2)
        own = {"Index": days.astype("datetime64[D]")} | {
            band: random.uniform(0, 1, 3) for band in ("NDVI", "NIR")
        }
        series.append(own)
    series[0]["NIR"][1] = np.nan
    rows = [Tibble(own | {"Index": Days(own["Index"].astype(np.int64))}) for own in series]
    start = Days(np.arange(n))
    table = Tibble(longitude=random.uniform(-60, -50, n), latitude=random.uniform(-15, -10, n))
    table |= {"start_date": start, "end_date": start, "label": np.array(["Pasture", "Soy_Corn"] * (n // 2))}
    table |= {"cube": np.array(["MOD13Q1"] * n), "time_series": rows}
    known = {**DEFAULT_CLASS_MAP, Days: days_to_r, Tibble: tibble_to_r}
    rdata.write_rda(path, {"samples": Tibble(table)}, constructor_dict=known)
    assert pandas  # what rdata reads tables as
    return series


def write_cawa(folder: Path, n: int = 12) -> np.ndarray:
    """CAWa: NDVI on the days 1, 17 and 33 of the year, NA where missing; values (n, 3)."""
    import pandas
    import pyogrio

    values = np.random.default_rng(6).uniform(0, 1, (n, 3))
    values[1, 2] = values[4, 0] = np.nan
    folder.mkdir(parents=True)
    lines = [",".join("NA" if np.isnan(value) else repr(float(value)) for value in row) for row in values]
    (folder / "CAWa_CropType_time-series.csv").write_text("\n".join(['"1","17","33"', *lines]) + "\n")
    columns = {
        "label_1": [("cotton", "wheat-other")[i % 2] for i in range(n)],
        "country": ["Uzbekistan"] * (n - 2) + ["Tajikistan"] * 2,
        "year": [str(2015 + i // 3) for i in range(n)],
    }
    path = folder / "CAWa_CropType_samples.dbf"
    pyogrio.write_dataframe(pandas.DataFrame(columns), path, driver="ESRI Shapefile")
    return values
