"""crlhf: RLHF with contrastive rewards (arXiv 2403.07708), small enough to read in an afternoon.

Data flows one way, one module a concept:

    reviews / data -> sft -> reward -> baselines -> contrastive -> ppo -> evaluate -> plots

`policy` (load, sample, log-probs) is used by every stage, `config` holds every default, `pipeline` chains
the stages and `python -m crlhf` is the way in.
"""

import os

__version__ = "0.1.0"

# Threads that wait for the next product sleep instead of spinning: on a machine that does anything else, spinning
# threads hold each other up and a step takes several times as long. Read by OpenMP when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
