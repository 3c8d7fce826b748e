"""Models of other libraries that stages need once: what is told where they cannot be loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from longtake.errors import TrainingError


@contextmanager
def loading(what: str, name: str, part: str, cache: str) -> Iterator[None]:
    """Importing a library and loading a model of it.

    Args:
        what: the model is. ``name``: a folder, or what the hub knows it by.
        part: folder inside it. ``cache``: what the stage leaves, which can be made elsewhere.

    Raises:
        TrainingError: the library is missing, or the model cannot be loaded.
    """
    try:
        yield
    except ImportError as error:
        raise TrainingError(
            f"the {what} needs {error.name}", "pip install 'longtake[wan]' brings it"
        ) from error
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise TrainingError(
            f"cannot load the {what} {name!r}: {reason}",
            f"give a local folder with {part} inside, for instance a download of "
            f"Wan-AI/Wan2.1-T2V-1.3B-Diffusers, or run this stage where the hub can be reached and copy its "
            f"folder {cache!r}",
        ) from error
