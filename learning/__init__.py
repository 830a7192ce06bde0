"""Loss, metrics, initialisation, training, runs and their results."""
