"""crlhf: RLHF with contrastive rewards (arXiv 2403.07708), small enough to read in an afternoon.

Data flows one way, one module a concept:

    reviews / data -> sft -> reward -> baselines -> contrastive -> ppo -> evaluate -> plots

`policy` (load, sample, log-probs) is used by every stage, `config` holds every default, `pipeline` chains
the stages and `python -m crlhf` is the way in.
"""

__version__ = "0.1.0"
