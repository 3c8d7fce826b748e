"""Strict configuration: frozen, typed, unknown keys refused by name. Packages own their config classes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator

from longtake.errors import ConfigError, nearest


class Config(BaseModel):
    """Base of every configuration class.

    Immutable and hashable. Whatever is wrong with the values raises :class:`~longtake.errors.ConfigError` at
    construction, with the value and a remedy: a typo names the nearest valid key and never becomes a default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    raise ConfigError(
                        f"{cls.__name__} has no key {key!r}", nearest(str(key), cls.model_fields)
                    )
        try:
            return handler(data)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(_places(first["loc"], data)) or cls.__name__
            if first["type"] == "missing":
                raise ConfigError(f"{cls.__name__} has no value for {name!r}", "set it") from error
            raise ConfigError(
                f"{cls.__name__}: {name}={first['input']!r} is refused: {first['msg']}"
            ) from error

    def replace(self, **changes: Any) -> Self:
        """A validated copy with some values changed. Raises ConfigError as construction does."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **changes})

    def dumps(self) -> str:
        """Canonical JSON, indented by two; :meth:`loads` reads it back to an equal config."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def loads(cls, text: str, source: str = "configuration") -> Self:
        """Read JSON strictly: no unknown keys, no strings for numbers.

        Raises:
            ConfigError: the text is not JSON or does not describe a valid config; ``source`` names it.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{source} is not valid JSON: {error}") from error
        try:
            return cls.model_validate(_lists_to_tuples(data), strict=True)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error.problem}", error.remedy) from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a JSON file, see :meth:`loads`. Raises ConfigError for an unreadable file too."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cannot read {str(path)!r}: {error}", "give the path of a readable JSON file"
            ) from error
        return cls.loads(text, source=str(path))

    def dump(self, path: Path) -> None:
        """Write :meth:`dumps` to a file."""
        path.write_text(self.dumps(), encoding="utf-8")

    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON: equal configs, and only those, have equal digests."""
        return hashlib.sha256(self.dumps().encode()).hexdigest()


def _places(loc: tuple[int | str, ...], data: Any) -> list[str]:
    """The names and indices of what was given on the way to an error, without those of a union's types."""
    found, at = [], data
    for index, part in enumerate(loc):
        if isinstance(at, dict) and (part in at or index == 0):  # a field may be missing, or wrong by default
            found.append(str(part))
            at = at.get(part)
        elif isinstance(at, list | tuple) and isinstance(part, int):
            found.append(str(part))
            at = at[part] if part < len(at) else None
    return found


def _lists_to_tuples(data: Any) -> Any:
    """JSON has no tuples and frozen configs hold no lists, so strict validation wants them turned."""
    if isinstance(data, list):
        return tuple(_lists_to_tuples(item) for item in data)
    if isinstance(data, dict):
        return {key: _lists_to_tuples(value) for key, value in data.items()}
    return data
