"""Areas of the predicted classes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.files import write_csv
from data.outlines import to_ground
from learning.predictions import Predictions

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

AREAS = "areas.csv"


def write_areas(predictions: Predictions, outlines: GeoDataFrame | None, output: Path) -> Path:
    """Writes areas.csv: a line per class with the number of parcels predicted as it, their hectares, and its shares.

    Shares, from 0 to 1, are of all parcels with a prediction. Hectares, on the ground and of the parcels that have an
    outline, are empty where no outlines are known. A last line, without a label, has parcels without any observation.

    Args:
        predictions: of all parcels.
        outlines: as `match_outlines` gives them; None where they are not known.
        output: folder to write to.
    """
    area = {}
    if outlines is not None:
        area = dict(zip(map(str, outlines["id"]), (to_ground(outlines).area / 10_000).tolist()))
    labels = [*predictions.classes, *([None] if None in predictions.labels else [])]
    parcels, hectares = dict.fromkeys(labels, 0), dict.fromkeys(labels, 0.0)
    for parcel, label in zip(predictions.ids, predictions.labels):
        parcels[label] += 1
        hectares[label] += area.get(parcel, 0.0)
    n, total = (sum(v for label, v in each.items() if label is not None) for each in (parcels, hectares))
    rows = [["label", "name", "parcels", "share", "hectares", "share_of_hectares"]]
    for label in labels:
        known = label is not None
        name = predictions.telling.names.get(str(label), label) if known else "no observation"
        share = f"{parcels[label] / n:.6g}" if known and n else None
        share_of_hectares = f"{hectares[label] / total:.6g}" if known and total else None
        own_hectares = f"{hectares[label]:.4f}" if area else None
        rows.append([label, name, parcels[label], share, own_hectares, share_of_hectares])
    write_csv(output / AREAS, rows)
    return output / AREAS
