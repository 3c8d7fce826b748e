"""What a stage leaves to look at: `log.jsonl`, tensorboard's event files, and pictures.

Every line of `log.jsonl` holds a step and either its training figures (means since the line before) or an
`evaluation`. Pictures are contact sheets, `samples/step-000500.png`: one row per clip, time from left to
right. Tensorboard shows the same three; where it is not installed, the files are all there is.
"""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from longtake.io.images import encode_png, sheet_picture

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TrainingLog:
    """The log of one stage, appended to as it goes; a context manager.

    Args:
        out: the stage's folder, which must exist.
        step: the step that the run starts from. What a killed run logged beyond it is dropped, as those steps
            are taken again.
    """

    def __init__(self, out: Path, step: int = 0) -> None:
        self._out = out
        _drop_beyond(out / "log.jsonl", step)
        self._file = (out / "log.jsonl").open("a", encoding="utf-8")
        self._writer = _summary_writer(out / "tensorboard", step)

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Training figures after a number of steps."""
        self._write({"step": step, **figures})
        self._scalars("train", figures, step)

    def evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures on held-out data."""
        self._write({"step": step, "evaluation": dict(figures)})
        self._scalars("evaluation", figures, step)

    def samples(self, step: int, frames_bthwc: Tensor) -> None:
        """Clips as uint8 [b,t,h,w,3]."""
        picture = sheet_picture(frames_bthwc.cpu().numpy())
        path = self._out / "samples" / f"step-{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        aside = path.with_suffix(".part")
        aside.write_bytes(encode_png(picture))
        os.replace(aside, path)
        if self._writer is not None:
            self._writer.add_image("samples", picture, step, dataformats="HWC")

    def close(self) -> None:
        """Write out what is buffered."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def _scalars(self, group: str, figures: Mapping[str, float], step: int) -> None:
        if self._writer is not None:
            for name, value in figures.items():
                self._writer.add_scalar(f"{group}/{name}", value, step)


def _drop_beyond(path: Path, step: int) -> None:
    """Cut a log after the last whole line of a step up to `step`."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            beyond = json.loads(line)["step"] > step
        except ValueError:  # the line that a kill tore
            beyond = True
        if not beyond:
            kept.append(line + "\n")
    aside = path.with_suffix(".part")
    aside.write_text("".join(kept), encoding="utf-8")
    os.replace(aside, path)


def _summary_writer(folder: Path, step: int) -> SummaryWriter | None:
    if importlib.util.find_spec("tensorboard") is None:
        warnings.warn(
            "tensorboard is not installed, so figures and samples go to files alone; "
            "pip install 'longtake[train]' brings it",
            stacklevel=3,
        )
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own dependencies' deprecations are not the user's affair
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(folder, purge_step=step + 1 if step > 0 else None)
