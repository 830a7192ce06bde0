"""How a run reads a dataset: what inference, resuming and notebooks must repeat to see what training saw."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from data.metadata import Arrays, LabelsTable, read_info, read_nomenclatures, read_units
from data.outlines import read_own_ids, to_dataset_ids

LABELS, EXTRA_FEATURE, NPIXEL = "label_44class", "geomfeat", 64
# The 20 classes of the paper, those with over 100 parcels of Sentinel2-Agri each.
CLASSES_20 = (1, 3, 4, 5, 6, 8, 9, 12, 13, 14, 16, 18, 19, 23, 28, 31, 33, 34, 36, 39)


@dataclass(frozen=True)
class DataSettings:
    """The settings of `PixelSetData.for_run`; the defaults are those of published weights.

    Attributes:
        labels: nomenclature of META/labels.json; None for none.
        labels_table: a table that takes the place of META/labels.json; None for none.
        classes: labels to tell apart, in the order of the model's outputs.
        npixel: pixels drawn per parcel.
        n_extra: number of extra features of META/geomfeat.json; 0 to leave them out.
        nodata: value that means missing in all channels of a pixel, besides NaN; None if there is none.
        nodata_declared: whether it is the one that META/info.json of the training data declared. Another dataset's own
            declaration then takes its place; a value that was typed stays.
        units: what a number of the training data is in reflectance, by its META/info.json; None if unknown.
        season_start: (month, day) that days are counted from; None for the first date of the dataset.
        until: YYYYMMDD or MM-DD, the last day whose pixels are used; None for all.
        varying: whether dates are treated as varying in any case.
        n_channels: channels that a dataset must have; None for any.
        n_dates: number of dates that a dataset must have, shared by all parcels; None for any.
        seed: of the pixels that evaluation draws.
        norm: mean and standard deviation of the pixels; None if they are not known yet.
        extra_stats: mean and standard deviation of the extra features; None to take those of the dataset.
    """

    labels: str | None = LABELS
    labels_table: LabelsTable | None = None
    classes: tuple[int | str, ...] = CLASSES_20
    npixel: int = NPIXEL
    n_extra: int = 4
    nodata: float | None = None
    nodata_declared: bool = False
    units: float | None = None
    season_start: tuple[int, int] | None = None
    until: str | None = None
    varying: bool = False
    n_channels: int | None = None
    n_dates: int | None = None
    seed: int = 1
    norm: Arrays | None = None
    extra_stats: Arrays | None = None

    def to_config(self) -> dict[str, Any]:
        """These settings as conf.json has them; mean and deviations have a file of their own."""
        return {
            "labels": self.labels,
            "labels_table": None if self.labels_table is None else list(self.labels_table),
            "sub_classes": list(self.classes),
            "npixel": self.npixel,
            "n_extra": self.n_extra,
            # JSON knows no infinity.
            "nodata": self.nodata if self.nodata is None or math.isfinite(self.nodata) else str(self.nodata),
            "nodata_declared": self.nodata_declared,
            "units": self.units,
            "season_start": None if self.season_start is None else list(self.season_start),
            "until": self.until,
            "varying_dates": self.varying,
            "rdm_seed": self.seed,
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], norm: Arrays | None = None, extra_stats: Arrays | None = None
    ) -> "DataSettings":
        """What `to_config` made of settings, read from a checked conf.json."""
        return cls(
            labels=config["labels"],
            labels_table=None if config["labels_table"] is None else LabelsTable(*config["labels_table"]),
            classes=tuple(config["sub_classes"]),
            npixel=config["npixel"],
            n_extra=config["n_extra"],
            nodata=None if config["nodata"] is None else float(config["nodata"]),
            nodata_declared=config["nodata_declared"],
            units=config["units"],
            season_start=None if config["season_start"] is None else tuple(config["season_start"]),
            until=config["until"],
            varying=config["lms"] is None,
            n_channels=config["input_dim"],
            n_dates=config["lms"],
            seed=config["rdm_seed"],
            norm=norm,
            extra_stats=extra_stats,
        )

    def nodata_in(self, folder: Path) -> float | None:
        """The value that means missing in a dataset."""
        declared = read_info(folder).get("nodata")
        if self.nodata is None or (self.nodata_declared and declared is not None):
            return declared
        return self.nodata

    def check_units(self, folder: Path) -> None:
        """Raises a UserError for a dataset in other units, unless its own normalisation is to be used."""
        found = read_units(folder)
        if None not in (self.units, found, self.norm) and not math.isclose(self.units, found, rel_tol=1e-6):
            raise UserError(
                f"a number in {folder} is {found:g} in reflectance, but the model was trained on {self.units:g}; prepare "
                "the data with the --scale and --offset of the training, or give their own --norm."
            )

    def arguments(self, folder: Path, labels_optional: bool) -> dict[str, Any]:
        """Keyword arguments of `PixelSetData` for a dataset.

        Args:
            folder: the dataset.
            labels_optional: whether a dataset without the labels will do.

        Raises:
            UserError: if a file is not as expected, or the dataset is in other units.
        """
        self.check_units(folder)
        labels = self.labels_in(folder, optional=labels_optional)
        return {
            "labels": labels,
            "npixel": self.npixel,
            "sub_classes": None if labels is None else self.classes,
            "extra_feature": EXTRA_FEATURE if self.n_extra else None,
            "extra_stats": self.extra_stats,
            "nodata": self.nodata_in(folder),
            "season_start": self.season_start,
            "until": self.until,
            "varying": self.varying,
        }

    def check_shape(self, folder: Path, varying: bool, n_dates: int, n_channels: int) -> None:
        """Raises a UserError for a dataset that has other dates or channels than the training's."""
        if varying and self.n_dates is not None:
            raise UserError(
                f"the model was trained on dates that all parcels share, but {folder} has other dates for each parcel, or "
                "observations are missing; train one with --varying_dates."
            )
        for what, expected, found in (
            ("channels", self.n_channels, n_channels),
            ("dates", self.n_dates, n_dates),
        ):
            if expected not in (None, found):
                raise UserError(f"the model was trained on {expected} {what} but {folder} has {found}.")

    def labels_in(self, folder: Path, optional: bool = False) -> str | Mapping[str, int | str] | None:
        """Labels of a dataset for `PixelSetData`: a nomenclature, or those of a table by parcel id; None for none.

        Args:
            folder: the dataset.
            optional: whether a dataset, or a table, without them will do.
        """
        if self.labels_table is not None:
            if optional and not Path(self.labels_table.path).exists():
                return None
            labels = self.labels_table.read()
            ids = to_dataset_ids(list(labels), read_own_ids(folder))
            return {parcel: label for parcel, label in zip(ids, labels.values()) if parcel is not None}
        if self.labels is None:
            return None
        if optional:
            if not (folder / "META" / "labels.json").exists():
                return None
            if self.labels not in read_nomenclatures(folder):
                return None
        return self.labels  # not what it holds, which would stay here while all else is read
