"""How published datasets are laid out: one file per format, each with a function `open_source`."""
