"""How much a model of yours gives away, wherever it is cut: the attacks, run on it, and a report.

`run.py` does it, `report.py` writes it down.
"""
