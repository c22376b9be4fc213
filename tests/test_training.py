"""The training loop: runs repeat, resume, and refuse nonsense."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from digits import IMAGES, LABELS, NORM, assert_equal, cut
from torch import nn

import fastinv
from fastinv.backends.torch import torch_threads
from fastinv.checkpoints import load_tensors, save_tensors
from fastinv.errors import TrainingError
from fastinv.schedule import Schedule
from fastinv.training import fit, train_target


@pytest.fixture(scope="module")
def split() -> fastinv.Split:
    return cut()


def test_training_repeats_and_leaves_the_global_generator_alone(split: fastinv.Split) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second, other = (
        fastinv.train_inverse_network(split, IMAGES, epochs=2, batch_size=7, seed=s) for s in (1, 1, 2)
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert_equal(first, second)
    with pytest.raises(AssertionError):
        assert_equal(first, other)
    assert not first.training


class Stop(Exception):
    pass


def stopping(split: fastinv.Split, after: int):
    """A decoder whose forward fails after so many batches: a run that was cut off."""

    class Decoder(nn.Sequential):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls > after:
                raise Stop
            return super().forward(x)

    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Decoder(nn.Flatten(), nn.Dropout(0.3), nn.Linear(1024, 784), nn.Unflatten(1, (1, 28, 28)))


def test_a_resumed_run_equals_an_uninterrupted_one(split: fastinv.Split, tmp_path) -> None:
    options = {"epochs": 4, "batch_size": 8}
    whole = fastinv.train_inverse_network(split, IMAGES, decoder=stopping(split, 99), **options)
    checkpoint = tmp_path / "run.pt"
    with pytest.raises(Stop):
        fastinv.train_inverse_network(split, IMAGES, decoder=stopping(split, 8), checkpoint=checkpoint, **options)
    assert checkpoint.exists()
    resumed = fastinv.train_inverse_network(
        split, IMAGES, decoder=stopping(split, 99), checkpoint=checkpoint, **options
    )
    assert resumed.calls == 6  # two of four epochs
    assert_equal(whole, resumed)


def test_checkpoints_of_other_runs_are_refused(split: fastinv.Split, tmp_path) -> None:
    checkpoint = tmp_path / "run.pt"
    fastinv.train_inverse_network(split, IMAGES, epochs=1, checkpoint=checkpoint)
    for images, options, difference in (
        (IMAGES, {"epochs": 2}, r"\(epochs 1, not 2\); .* to train a finished network on, pass it"),
        (
            IMAGES,
            {"epochs": 1, "lr": 1e-3, "seed": 3},
            r"\(lr 0.004, not 0.001, seed 0, not 3\); delete it or name another file$",
        ),
        (IMAGES, {"epochs": 1, "kind": "residual"}, r"\(another network\)"),
        (IMAGES[::-1].copy(), {"epochs": 1}, r"\(other data\)"),
    ):
        with pytest.raises(TrainingError, match=f"another run {difference}"):
            fastinv.train_inverse_network(split, images, checkpoint=checkpoint, **options)
    save_tensors({"epoch": 1}, checkpoint)
    with pytest.raises(TrainingError, match="no checkpoint of this version"):
        fastinv.train_inverse_network(split, IMAGES, epochs=1, checkpoint=checkpoint)
    checkpoint.write_bytes(b"nonsense")
    with pytest.raises(TrainingError, match="cannot be read"):
        fastinv.train_inverse_network(split, IMAGES, epochs=1, checkpoint=checkpoint)
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]  # no temporary left


def test_divergence_is_an_error(split: fastinv.Split) -> None:
    with pytest.raises(TrainingError, match="diverged"):
        fastinv.train_inverse_network(split, IMAGES, optimizer="sgd", lr=1e9, epochs=5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": -1}, "epochs -1"),
        ({"epochs": 1.5}, "epochs 1.5"),
        ({"epochs": True}, "epochs True"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"lr": 0.0}, "lr 0.0"),
        ({"lr": float("nan")}, "lr nan"),
        ({"optimizer": "rmsprop"}, "optimizer 'rmsprop'"),
        ({"seed": 1.0}, "seed 1.0"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**32}, "seed 4294967296, expected an integer >= 0 and below"),
        ({"optimizer": ["adam"]}, "optimizer"),
        ({"precision": "float16"}, "precision 'float16', expected one of float32, bfloat16"),
        ({"device": "meta"}, "device 'meta' cannot be had here .*; expected 'cpu', 'cuda' or as in 'cuda:1'"),
        ({"device": "nonsense"}, "device 'nonsense' cannot be had here"),
        ({"device": 1.5}, "device '1.5' cannot be had here"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be had here"),
    ],
)
def test_wrong_schedules(changes: dict, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        Schedule(**{"epochs": 1, "batch_size": 1, "lr": 0.1, **changes})


def test_numpy_s_numbers_make_a_schedule(tmp_path) -> None:
    schedule = Schedule(np.int64(1), np.int32(2), np.float32(0.5), seed=np.uint8(3))
    assert schedule == Schedule(1, 2, 0.5, seed=3)
    module = nn.Linear(2, 1)
    fit(module, lambda i: module(torch.zeros(len(i), 2)).mean(), 3, schedule, checkpoint=tmp_path / "run.pt")


def test_losses_that_cannot_be_descended() -> None:
    module = nn.Linear(2, 1)
    with pytest.raises(TrainingError, match="expected a tensor of one number"):
        fit(module, lambda i: module(torch.zeros(len(i), 2)), 3, Schedule(1, 2, 0.1))
    with pytest.raises(TrainingError, match="a batch cannot be computed"):
        fit(module, lambda i: module(torch.zeros(len(i), 5)).mean(), 3, Schedule(1, 2, 0.1))
    with pytest.raises(TrainingError, match="with a gradient"):
        fit(module, lambda i: module(torch.zeros(len(i), 2)).mean().detach(), 3, Schedule(1, 2, 0.1))
    once = module(torch.zeros(2)).sum()
    with pytest.raises(TrainingError, match="a batch has no gradient"):  # twice through what is freed
        fit(module, lambda i: once * once, 3, Schedule(1, 2, 0.1))


@pytest.mark.parametrize(
    ("place", "message"),
    [("none/run.pt", "cannot be written"), ("\0", "cannot be written"), (5, "checkpoint: a int")],
)
def test_a_checkpoint_that_cannot_be_written_is_told_before_training(tmp_path, place, message: str) -> None:
    module = nn.Linear(2, 1)
    checkpoint = tmp_path / place if isinstance(place, str) else place
    with pytest.raises(TrainingError, match=message):
        fit(module, lambda i: pytest.fail("it trains"), 3, Schedule(1, 1, 0.1), checkpoint=checkpoint)


def test_a_link_to_a_checkpoint_stays_one(tmp_path) -> None:
    link = tmp_path / "link.pt"
    link.symlink_to(tmp_path / "run.pt")
    save_tensors({"x": torch.ones(2)}, link)
    assert link.is_symlink()
    assert load_tensors(tmp_path / "run.pt")["x"].sum() == 2


@pytest.mark.parametrize("name", ["run.safetensors", "run.finv", "run"])
def test_checkpoints_of_any_name_are_read_back(split: fastinv.Split, tmp_path, name: str) -> None:
    options = {"epochs": 1, "checkpoint": tmp_path / name}
    first, again = (fastinv.train_inverse_network(split, IMAGES, **options) for _ in range(2))
    assert_equal(first, again)


def test_a_file_that_is_no_checkpoint_is_told_in_our_own_words(tmp_path) -> None:
    torch.save(nn.Linear(2, 1), tmp_path / "module.pt")
    with pytest.raises(TrainingError, match=r"module\.pt: cannot be read: cut off, or no file of tensors.*[^.]$"):
        load_tensors(tmp_path / "module.pt")
    with pytest.raises(TrainingError, match=r"\(No such file or directory\); name another file"):
        load_tensors(tmp_path / "none.pt")


def test_progress_is_shown_where_asked_for(split: fastinv.Split, capfd) -> None:
    fastinv.train_inverse_network(split, IMAGES, epochs=1, progress=True)
    assert "inverse network" in capfd.readouterr().err
    fastinv.train_inverse_network(split, IMAGES, epochs=1)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("small", "expected"), [(10**9, [1, 1, 1]), (0, [1, 2, 2])])
def test_small_steps_run_on_one_thread(monkeypatch, small: int, expected: list[int]) -> None:
    monkeypatch.setattr("fastinv.training.SMALL_STEP", small)
    module = nn.Linear(2, 1)
    seen: list[int] = []

    def loss(indices: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return module(torch.ones(len(indices), 2)).mean()

    with torch_threads(2):
        fit(module, loss, 3, Schedule(1, 1, 0.1))
        assert torch.get_num_threads() == 2
    assert seen == expected


def test_bfloat16_keeps_weights_and_queries_in_float32(split: fastinv.Split, tmp_path) -> None:
    asked: list[bool] = []

    def query(images: np.ndarray) -> np.ndarray:
        asked.append(torch.is_autocast_enabled("cpu"))
        return split.features(images)

    options = {"epochs": 2, "precision": "bfloat16", **NORM}
    train = fastinv.train_inverse_network
    with pytest.warns(UserWarning, match="queried again"):
        first = train(query, IMAGES, cache_bytes=0, **options)
    assert len(asked) > 2
    assert not any(asked)
    assert {p.dtype for p in first.parameters()} == {torch.float32}
    assert_equal(first, train(split, IMAGES, checkpoint=tmp_path / "run.pt", **options))
    exact = train(split, IMAGES, epochs=2)
    with pytest.raises(AssertionError):
        assert_equal(first, exact)
    for a, b in zip(first.parameters(), exact.parameters(), strict=True):
        assert (a - b).norm() < 0.05 * b.norm() + 0.05
    with pytest.raises(TrainingError, match="precision 'bfloat16', not 'float32'"):
        train(split, IMAGES, epochs=2, checkpoint=tmp_path / "run.pt")


def test_a_checkpoint_of_another_device_is_of_the_same_run() -> None:
    assert Schedule(1, 2, 0.5, device="cpu").identity() == Schedule(1, 2, 0.5).identity()


class Viewing(nn.Module):
    """A forward that cannot take the results of convolutions channels last, as the one in PyTorch's tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.head = nn.Linear(3 * 26 * 26, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        found: torch.Tensor = self.head(y.view(len(y), -1))
        return found


COLOURED = IMAGES.repeat(2, axis=1)


def layouts(model: nn.Module, conv: nn.Module, **options) -> list[bool]:
    """Of the results of a convolution, whether they lie channels last, step by step of training."""
    seen: list[bool] = []
    conv.register_forward_hook(lambda _, x, y: seen.append(y.is_contiguous(memory_format=torch.channels_last)))
    train_target(model, COLOURED, LABELS, epochs=2, batch_size=12, **options)
    assert all(p.is_contiguous() for p in model.parameters())
    return seen


def test_convolutions_compute_channels_last_where_the_forward_can() -> None:
    conv, viewing = nn.Conv2d(2, 3, 3), Viewing()
    assert layouts(nn.Sequential(conv, nn.Flatten(), nn.Linear(3 * 26 * 26, 10)), conv) == [True] * 4
    assert layouts(viewing, viewing.conv) == [False] * 4
    assert layouts(nn.Sequential(viewing), viewing.conv, precision="bfloat16") == [False] * 4


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_share_memory_go_on_to(tied: bool) -> None:
    first, second = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
    if tied:
        second.weight.data = first.weight.data
    else:
        first.weight.data = first.weight.data.contiguous(memory_format=torch.channels_last)
    model = nn.Sequential(first, second, nn.Flatten(), nn.Linear(2 * 28 * 28, 10))
    train_target(model, COLOURED, LABELS, epochs=1)
    assert (second.weight.data_ptr() == first.weight.data_ptr()) == tied
    assert first.weight.is_contiguous() == tied  # as it was


def test_a_module_in_eval_mode_trains_in_training_mode(tmp_path) -> None:
    norm = nn.BatchNorm2d(1)
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(784, 10)).eval()
    train_target(model, IMAGES, LABELS, epochs=2, batch_size=12, checkpoint=tmp_path / "run.pt")
    assert norm.num_batches_tracked == 4
    assert not model.training


def test_a_shadow_before_a_cloud_that_needs_channels_first() -> None:
    class Cloud(nn.Module):
        def forward(self, v: torch.Tensor) -> torch.Tensor:
            return v.view(len(v), -1)[:, :10]

    for cloud in (Cloud(), nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 10))):
        shadow = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU())
        fastinv.train_shadow(cloud, COLOURED, LABELS, shadow, epochs=1)


def test_a_cloud_that_gives_no_logits_is_told() -> None:
    class Cloud(nn.Module):
        def forward(self, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return v, v

    with pytest.raises(TrainingError, match="logits of type tuple"):
        fastinv.train_shadow(Cloud(), COLOURED, LABELS, nn.Conv2d(2, 3, 3), epochs=1)


def test_no_samples() -> None:
    with pytest.raises(TrainingError, match="no samples"):
        fit(nn.Linear(1, 1), lambda i: torch.zeros(()), 0, Schedule(1, 1, 0.1))
