"""Areas of the predicted classes."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.files import write_bytes
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
    labels: Sequence[int | str | None] = [
        *predictions.classes,
        *([None] if None in predictions.labels else []),
    ]
    parcels, hectares = dict.fromkeys(labels, 0), dict.fromkeys(labels, 0.0)
    for parcel, label in zip(predictions.ids, predictions.labels):
        parcels[label] += 1
        hectares[label] += area.get(parcel, 0.0)
    n, total = (sum(v for label, v in each.items() if label is not None) for each in (parcels, hectares))
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["label", "name", "parcels", "share", "hectares", "share_of_hectares"])
    for label in labels:
        known = label is not None
        row = [
            label,
            predictions.telling.names.get(str(label), label) if known else "no observation",
            parcels[label],
        ]
        row.append(f"{parcels[label] / n:.6g}" if known and n else None)
        row.append(f"{hectares[label]:.4f}" if area else None)
        row.append(f"{hectares[label] / total:.6g}" if known and total else None)
        table.writerow(row)
    write_bytes(output / AREAS, text.getvalue().encode())
    return output / AREAS
