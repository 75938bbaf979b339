"""From a run on one GPU to engines for many: `python -m crlhf export`, and where contrast matters there."""
