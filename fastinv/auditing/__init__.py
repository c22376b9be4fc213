"""How much a model of yours gives away, wherever it is cut: the attacks, run on it, and a report.

`run.py` is the door, `attacks.py` names the attacks, `points.py` says where a model can be cut, `protection.py` what is
done to features before they are sent, `runner.py` runs the attacks, and `report.py` writes down what they gave.
"""
