"""Loss, metrics, initialisation, and what the two scripts share: options, loops, results, figures."""

import os

# Threads that spin while they wait slow a step down up to eight times when another process uses a core. OpenMP reads
# this when torch is imported, so a script imports this package first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
