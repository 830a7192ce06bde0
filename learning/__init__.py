"""Loss, metrics, initialisation, and what the two scripts share: options, loops, checkpoints, figures."""
