"""The paper's experiments on data at hand: what its tables hold, measured again.

`paper.py` says what the tables are, `settings.py` how long to train, `recipe.py` how rMLE is set, `run.py` does it,
`results.py` keeps what came out, and `report.py` writes it down.
"""
