"""What experiments have in common: what they are, how rMLE is set for one, how one is run, kept and scored.

`cells.py` says what an experiment is, `target.py` has the paper's targets to run it on, `recipe.py` sets rMLE, `run.py`
does it, `results.py` keeps what came out, `scores.py` has its figures,
and `reporting.py` the parts of reports.
"""
