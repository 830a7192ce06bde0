"""Parcels whose label looks wrong: classifiers that did not learn from them predict another class, the surest first.

How sure it is that the class is another one is 1 less the probability of the label. Where wrong labels are as likely to be
any other class, no order by these probabilities brings more of them to the front; that of the confidence in the
predicted class brings fewer, since it passes over labels that are out of question while two other classes are not.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from common.files import write_csv
from learning.predictions import read_rows
from reports.plots import save_figure, shorten

SUSPECTS, PICTURE = "suspects.csv", "suspects.png"
LEVELS = {"below 0.01": 0.01, "0.01 to 0.1": 0.1, "0.1 and more": 1.0}  # probability of the label is below
_COLOURS = "#d55e00", "#e69f00", "#bbbbbb"
_MOST_PAIRS = 20

# Columns of suspects.csv, as far as predictions.csv has them.
COLUMNS = [
    *("id", "parcel", "true_label", "true_name", "predicted_label", "predicted_name", "confidence"),
    *("true_probability", "predicted_by", "set"),
]
Row = dict[str, str]


def find_suspects(rows: Iterator[Row]) -> tuple[list[Row], int]:
    """The parcels that are predicted as another class than their label says.

    Args:
        rows: of predictions.csv. Parcels without a label, without a prediction, or that the classifiers learned from are
            passed over.

    Returns:
        What suspects.csv tells of them, the least probable label first and, of equal ones, the most confident prediction;
        and how many parcels were looked at.
    """
    suspects, n_looked_at = [], 0
    for row in rows:
        true, predicted = row["true_label"], row["predicted_label"]
        if not true or not predicted or row["predicted_by"] == "seen":
            continue
        n_looked_at += 1
        if true != predicted:
            row["true_probability"] = row[f"probability_{true}"]
            suspects.append({name: row[name] for name in COLUMNS if name in row})
    suspects.sort(key=lambda row: (float(row["true_probability"]), -float(row["confidence"])))
    return suspects, n_looked_at


def write_suspects(table: Path, output: Path) -> str:
    """Writes suspects.csv and suspects.png; returns what was found, in words.

    Args:
        table: predictions.csv, in which every parcel is predicted out of fold or marked as seen.
        output: folder to write to.
    """
    first = next(read_rows(table), {})
    suspects, n_looked_at = find_suspects(read_rows(table))
    columns = [name for name in COLUMNS if name in first or name == "true_probability"]
    write_csv(output / SUSPECTS, [columns, *([row[name] for name in columns] for row in suspects)])
    save_figure(output / PICTURE, plot_suspects(suspects, n_looked_at))
    return (
        f"{len(suspects)} of {n_looked_at} parcels with a known class are predicted as another, the least probable label first: "
        f"{output / SUSPECTS}, {output / PICTURE}"
    )


def plot_suspects(suspects: Sequence[Row], n_looked_at: int) -> Figure:
    """How many parcels of which label are predicted as which other class, by the label's probability.

    Args:
        suspects: as `find_suspects` gives them.
        n_looked_at: number of parcels with a label.
    """
    pairs = [
        tuple(row.get(f"{which}_name", row[f"{which}_label"]) for which in ("true", "predicted"))
        for row in suspects
    ]
    shown = [pair for pair, _ in Counter(pairs).most_common(_MOST_PAIRS)]
    probabilities = [float(row["true_probability"]) for row in suspects]
    level = np.searchsorted([*LEVELS.values()], probabilities, side="right")
    counts = np.zeros((len(shown), len(LEVELS)), np.int64)
    for pair, k in zip(pairs, level):
        if pair in shown:
            counts[shown.index(pair), k] += 1
    figure = Figure(figsize=(8, 1.6 + 0.26 * max(len(shown), 1)), layout="constrained")
    axis = figure.subplots()
    for k, (words, colour) in enumerate(zip(LEVELS, _COLOURS)):
        left = counts[:, :k].sum(1)
        axis.barh(range(len(shown)), counts[:, k], left=left, color=colour, label=words)
    names = shorten([name for pair in shown for name in pair], 28)
    words = [f"{true} \u2192 {other}" for true, other in zip(names[::2], names[1::2])]
    axis.set_yticks(range(len(shown)), words, fontsize="small", parse_math=False)
    axis.invert_yaxis()
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("parcels")
    if suspects:
        axis.legend(title="probability\nof the label", frameon=False, fontsize="small")
    rest = f"; the {len(shown)} most frequent pairs" if len(set(pairs)) > len(shown) else ""
    axis.set_title(
        f"{len(suspects):,} of {n_looked_at:,} parcels: label \u2192 predicted class{rest}", fontsize="medium"
    )
    return figure
