"""Models in code of the user's, with weights in files."""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from fastinv.errors import FormatError, NetworkError, TrainingError
from fastinv.model_files import load_model
from fastinv.models import lenet5

CODE = """
from __future__ import annotations
from dataclasses import dataclass
import helper
from torch import nn

class Namespace:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 26 * 26, 10))

def build():
    return helper.lenet5()

def needs(argument):
    return nn.ReLU()

def nothing():
    return None

def late():
    import helper_of_functions
    return helper_of_functions.lenet5()

@dataclass
class Settings:
    width: int = 8
"""


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "helper.py").write_text("from fastinv.models import lenet5")
    (tmp_path / "helper_of_functions.py").write_text("from fastinv.models import lenet5")
    file = tmp_path / "net.py"
    file.write_text(CODE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("helper", "helper_of_functions", "net"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return file


def test_models_in_files(code: Path) -> None:
    model, untrained = load_model(f"{code}:build")
    assert untrained is None
    assert not model.training
    assert isinstance(load_model(f"{code}:Namespace.model")[0][0], nn.Conv2d)
    assert isinstance(load_model(f"{code}:late")[0].conv1, nn.Conv2d)
    assert isinstance(load_model("fastinv.models:lenet5")[0].conv1, nn.Conv2d)


@pytest.mark.parametrize("name", ["net.pt", "nested.pt", "parallel.pt", "net.safetensors"])
def test_weights(code: Path, tmp_path: Path, name: str) -> None:
    from safetensors.torch import save_file

    state = lenet5().state_dict()
    file = tmp_path / name
    if name == "net.safetensors":
        save_file(state, file)
    elif name == "nested.pt":
        torch.save({"state_dict": state, "epoch": 3}, file)
    else:
        prefix = "module." if name == "parallel.pt" else ""
        torch.save({f"{prefix}{key}": value for key, value in state.items()}, file)
    model, untrained = load_model(f"{code}:build", file)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert untrained is not None
    assert not torch.equal(untrained().state_dict()["fc1.weight"], state["fc1.weight"])


def test_a_part_that_is_called_module_keeps_its_name(tmp_path: Path) -> None:
    model = nn.Sequential(OrderedDict(module=nn.Linear(2, 3)))
    torch.save(model.state_dict(), tmp_path / "net.pt")
    (tmp_path / "wrapped.py").write_text(
        "from collections import OrderedDict\nfrom torch import nn\n"
        "def build(): return nn.Sequential(OrderedDict(module=nn.Linear(2, 3)))\n"
    )
    found, _ = load_model(f"{tmp_path / 'wrapped.py'}:build", tmp_path / "net.pt")
    torch.testing.assert_close(found.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_models_that_are_none(code: Path, tmp_path: Path) -> None:
    for place, words in (
        ("net.py", "expected FILE.py:NAME"),
        (f"{tmp_path / 'missing.py'}:build", "cannot be imported"),
        ("no.such.package:build", "cannot be imported"),
        (f"{code}:built", "has no 'built'; it has .*helper, nn, Namespace, build"),
        (f"{code}:needs", "fails, called without arguments"),
        (f"{code}:nothing", "gives a NoneType, expected a torch.nn.Module"),
        (f"{code}:helper", "fails, called"),
    ):
        with pytest.raises(NetworkError, match=words):
            load_model(place)
    for name, content, words in (
        ("missing.pt", None, "cannot be read"),
        ("cut.pt", b"PK", "cannot be read"),
        ("cut.safetensors", b"PK", "cannot be read"),
        ("other.pt", {"conv9.weight": torch.zeros(1)}, "not the weights of this model"),
        ("list.pt", [torch.zeros(1)], "holds a list"),
        ("numbers.pt", {1: torch.zeros(1)}, "expected a state dict, of tensors by name"),
    ):
        file = tmp_path / name
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif content is not None:
            torch.save(content, file)
        with pytest.raises((FormatError, TrainingError), match=words):
            load_model(f"{code}:build", file)
