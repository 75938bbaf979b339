"""crlhf: RLHF with contrastive rewards (arXiv 2403.07708), small enough to read in an afternoon.

Data flows one way, one concept a file:

    reviews / data -> sft -> reward -> baselines -> contrastive -> ppo, dpo -> evaluate

`policy` (sample, log-probs) is used by every stage and `config` holds every default. The concepts stand on `engine/`
(forward passes, the training loop, files); `pipeline/` chains them, and `python -m crlhf` is the way in.
"""

import os

__version__ = "0.1.0"

# OpenMP threads that wait for the next product look for it so many times before they sleep, which bridges the gaps
# between two products (tens of microseconds). With none, two threads are no quicker than one. With as many as is usual,
# threads that share a core with any other program hold each other up tenfold. Read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
