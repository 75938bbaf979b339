"""`python -m crlhf judge`: blind pairs, judged by a language model or by people, and how far to trust them.

pairs.py makes the pairs, comparison.py keeps their folder, endpoint.py asks a model about them and people.py asks
raters, verdicts.py turns answers into scores, statistics.py and report.py say what the scores come to, and command.py
ties them together.
"""
