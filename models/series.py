"""Where batches of dates that vary were, for code that imports them from here; see `data.batch`."""

from data.batch import Batch as Series

__all__ = ["Series"]
