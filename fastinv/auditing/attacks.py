"""What an audit does to a model, by the names that users give. Loads no torch."""

from __future__ import annotations

from fastinv.experiment.cells import Attack

ATTACKS = {
    "rmle": Attack("white-box: rMLE", "rmle"),
    "inverse_network": Attack("black-box: inverse network", "inverse_network", "distribution"),
    "refined": Attack("white-box, with images: rMLE from an inverse network", "refined"),
    "inverse_network-noise": Attack("black-box: inverse network, from noise", "inverse_network", "noise"),
    "fit_shadow": Attack("black-box: shadow fitted to queries, rMLE", "fit_shadow", "distribution", "same"),
    "shadow": Attack("query-free: shadow, rMLE", "shadow", "distribution", "same"),
}
DEFAULT = ("rmle", "inverse_network", "refined")  # all that need only the model and images
SHADOWS = ("fit_shadow", "shadow")
