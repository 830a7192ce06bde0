"""Loss, metrics, initialisation, and what the two scripts share: options, loops, results, figures."""

import os

# Threads that spin while they wait slow a step down up to eight times when another process uses a core. On a machine
# that does nothing else spinning is faster, up to twice: OMP_WAIT_POLICY=ACTIVE. OpenMP reads this when torch is
# imported, so a script imports this package first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
