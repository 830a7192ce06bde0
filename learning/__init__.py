"""Loss, metrics, initialisation, and what the two scripts share: options, loops, results, figures."""

import os

# OpenMP's threads that spin while they wait slow a step down several times when another process uses a core. On a
# machine that does nothing else spinning is somewhat faster: OMP_WAIT_POLICY=ACTIVE. OpenMP reads this when torch is
# imported, so a script imports this package first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
