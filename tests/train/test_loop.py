"""The loop itself, on a task of one matrix: accumulation, averages, resume, precision, logs."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from longtake.config import Config
from longtake.errors import ConfigError, TrainingError
from longtake.train.loop import STOPPED_EARLY, Learner, LoopConfig, build_optimizer, run
from longtake.train.optim import AdamWConfig


class Regression:
    """Rows of fixed data, `batch` of them per draw, each with an error of its own."""

    def __init__(self, config: LoopConfig, batch: int = 2, adamw: AdamWConfig | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(64, 5, generator=generator)
        self.targets = torch.randn(64, 3, generator=generator)
        self.batch = batch
        self.config = config
        self.module = nn.Linear(5, 3)
        with torch.no_grad():
            self.module.weight.copy_(torch.randn(3, 5, generator=generator))
            self.module.bias.zero_()
        self.gradients: list[Tensor] = []
        self.dtypes: set[torch.dtype] = set()
        self.weights: list[Tensor] = []
        optimizer = build_optimizer(self.module, 1e-2, 1e-2, config.precision, only_adamw=adamw)
        optimizer.register_step_pre_hook(lambda *_: self.gradients.append(self._gradient()))
        optimizer.register_step_post_hook(lambda *_: self.weights.append(self.module.weight.detach().clone()))
        self.learners = {"": Learner(self.module, optimizer, self.loss)}

    def _gradient(self) -> Tensor:
        assert self.module.weight.grad is not None
        return self.module.weight.grad.clone()

    def loss(self, draw: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        rows = [(draw * self.batch + i) % 64 for i in range(self.batch)]
        out = self.module(self.inputs[rows])
        self.dtypes.add(out.dtype)
        return (out.float() - self.targets[rows]).square().mean(), {"first_row": float(rows[0])}

    def evaluate(self) -> dict[str, float]:
        return {"weight": float(self.module.weight.detach().sum())}

    def samples(self) -> Tensor:
        shade = int(self.module.weight.detach().abs().sum() * 10) % 256
        return torch.full((2, 3, 4, 6, 3), shade, dtype=torch.uint8)


def settings(**changes: object) -> LoopConfig:
    base = LoopConfig(num_steps=4, log_every_steps=2, evaluate_every_steps=2, precision="fp32")
    return base.replace(**changes)


def rows_of(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_micro_steps_have_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    parts = Regression(settings(accumulation_steps=3, gradient_clip=1e6), batch=2)
    whole = Regression(settings(gradient_clip=1e6), batch=6)
    run(parts, parts.config, tmp_path / "parts")
    run(whole, whole.config, tmp_path / "whole")
    assert len(parts.gradients) == len(whole.gradients) == 4
    for ours, theirs in zip(parts.gradients, whole.gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    losses = [
        [row["loss"] for row in rows_of(tmp_path / name) if "loss" in row] for name in ("parts", "whole")
    ]
    assert losses[0] == pytest.approx(losses[1])
    assert rows_of(tmp_path / "parts")[0]["first_row"] == 5.0  # of draws 0..5: each its own rows


class Noisy(Regression):
    """Draws from torch's own generator, as foreign modules (dropout) do."""

    def loss(self, draw: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        loss, figures = super().loss(draw, progress)
        return loss + (torch.rand(3, 5) * self.module.weight).sum(), figures


@pytest.mark.parametrize("optimizer", [None, AdamWConfig(learning_rate=1e-2, betas=(0.0, 0.999))])
def test_a_killed_run_goes_on_exactly(tmp_path: Path, optimizer: AdamWConfig | None) -> None:
    config = settings(num_steps=7, accumulation_steps=2, log_every_steps=3, ema_from_step=2)

    def made(kind: Callable[..., Regression] = Noisy) -> Regression:
        torch.manual_seed(1)
        return kind(config, adamw=optimizer)

    whole = made()
    figures = run(whole, config, tmp_path / "whole")
    one = made()
    assert run(one, config, tmp_path / "parts", stop_after_seconds=0.0)[STOPPED_EARLY] == 1
    two = made()
    assert run(two, config, tmp_path / "parts", stop_after_seconds=0.0)[STOPPED_EARLY] == 2
    with (tmp_path / "parts" / "log.jsonl").open("a") as log:  # what a kill leaves: lines ahead, one torn
        log.write('{"step": 3, "loss": 9}\n{"step": 4, "lo')
    three = made()
    assert run(three, config, tmp_path / "parts") == figures
    assert torch.equal(whole.module.weight, three.module.weight)
    assert torch.equal(whole.module.bias, three.module.bias)
    timeless = [
        [{key: value for key, value in row.items() if key != "seconds"} for row in rows_of(tmp_path / name)]
        for name in ("whole", "parts")
    ]
    assert timeless[0] == timeless[1]
    assert [row["step"] for row in timeless[0]] == [2, 3, 4, 6, 6, 7]
    assert run(made(), config, tmp_path / "parts") == figures  # a finished stage tells its figures again


def test_checkpoints_from_before_a_setting_existed_are_read(tmp_path: Path) -> None:
    config = settings(num_steps=2)
    run(Regression(config), config, tmp_path)
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path)
    stored = json.loads(state["config"])
    for name in ("accumulation_steps", "recompute", "ema_from_step"):
        del stored[name]
    for key in ("window", "figures", "rng"):
        del state[key]
    torch.save({**state, "config": json.dumps(stored)}, path)
    run(Regression(config), config, tmp_path)
    with pytest.raises(TrainingError, match=r"accumulation_steps=1, not 2; ema_from_step=0, not 1"):
        changed = config.replace(accumulation_steps=2, ema_from_step=1)
        run(Regression(changed), changed, tmp_path)
    torch.save({**state, "config": json.dumps({**stored, "gone": 1})}, path)
    with pytest.raises(TrainingError, match=r"another version.*'gone'"):
        run(Regression(config), config, tmp_path)


class Stage(Config):
    loop: LoopConfig
    guidance: float = 1.0


def test_a_run_goes_on_under_all_settings_of_its_stage(tmp_path: Path) -> None:
    stage = Stage(loop=settings(num_steps=3))
    run(Regression(stage.loop), stage.loop, tmp_path, 0.0, stage)
    for changed, named in (
        (stage.replace(guidance=2.0), "guidance=1.0, not 2.0"),
        (stage.replace(loop=settings(num_steps=5)), "loop.num_steps=3, not 5"),
    ):
        with pytest.raises(TrainingError, match=named):
            run(Regression(changed.loop), changed.loop, tmp_path, settings=changed)
    run(Regression(stage.loop), stage.loop, tmp_path, settings=stage)


def test_what_products_run_in_is_kept_where_it_was_measured(tmp_path: Path) -> None:
    config = settings(num_steps=3, precision="auto")
    run(Regression(config), config, tmp_path, 0.0)
    path = tmp_path / "checkpoint.pt"
    state = torch.load(path)
    for stored, expected in (("torch.bfloat16", torch.bfloat16), ("None", torch.float32)):
        torch.save({**state, "dtype": stored}, path)
        task = Regression(config)
        run(task, config, tmp_path, 0.0)
        assert task.dtypes == {expected}


def test_the_average_begins_where_it_is_told(tmp_path: Path) -> None:
    config = settings(num_steps=5, ema_decay=0.9, ema_from_step=3, evaluate_every_steps=9)
    task = Regression(config)
    run(task, config, tmp_path)
    expected = task.weights[2]
    for weight in task.weights[3:]:
        expected = 0.9 * expected + 0.1 * weight
    torch.testing.assert_close(task.module.weight.detach(), expected)
    with pytest.raises(ConfigError, match="ema_from_step=5 lies beyond num_steps=5"):
        settings(num_steps=5, ema_from_step=5)


def test_products_in_bf16_leave_weights_and_state_in_fp32(tmp_path: Path) -> None:
    full, half = settings(), settings(precision="bf16")
    tasks = [Regression(full), Regression(half)]
    for index, task in enumerate(tasks):
        run(task, task.config, tmp_path / str(index))
    assert tasks[0].dtypes == {torch.float32}
    assert tasks[1].dtypes == {torch.bfloat16}
    optimizer = tasks[1].learners[""].optimizer
    held = [
        tensor for state in optimizer.state.values() for tensor in state.values() if torch.is_tensor(tensor)
    ]
    assert {tensor.dtype for tensor in [*held, *tasks[1].module.parameters(), *tasks[1].gradients]} == {
        torch.float32
    }
    torch.testing.assert_close(tasks[0].gradients[0], tasks[1].gradients[0], atol=0.05, rtol=0.05)
    assert not torch.equal(tasks[0].gradients[0], tasks[1].gradients[0])


def test_tensorboard_tells_what_the_files_tell(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = settings()
    run(Regression(config), config, tmp_path, stop_after_seconds=0.0)
    run(Regression(config), config, tmp_path)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    evaluations = [
        (row["step"], row["evaluation"]["weight"]) for row in rows_of(tmp_path) if "evaluation" in row
    ]
    shown = [(event.step, event.value) for event in events.Scalars("evaluation/weight")]
    assert [step for step, _ in shown] == [2, 4]
    assert shown == [(step, pytest.approx(value)) for step, value in evaluations]
    assert {"train/loss", "train/norm", "train/first_row", "train/seconds"} <= set(events.Tags()["scalars"])


def test_without_tensorboard_the_files_remain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = settings()
    with pytest.warns(UserWarning, match=r"pip install 'longtake\[train\]'"):
        run(Regression(config), config, tmp_path)
    assert len(rows_of(tmp_path)) == 4
    assert not (tmp_path / "tensorboard").exists()


def test_a_diverged_loss_is_an_error(tmp_path: Path) -> None:
    config = settings()
    task = Regression(config)
    task.targets.fill_(float("inf"))
    with pytest.raises(TrainingError, match=r"step 0: loss inf, gradient norm .*; lower the learning rate"):
        run(task, config, tmp_path)
