"""A dataset folder as data: metadata, packed pixels, draws, folds, batches."""
