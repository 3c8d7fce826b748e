"""Strict configuration: typos are named, values are refused, JSON goes there and back."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from longtake.config import Config
from longtake.errors import ConfigError, LongtakeError


class Inner(Config):
    size: tuple[int, int] = (2, 3)


class Outer(Config):
    width: int
    rate: float = 0.5
    inner: Inner = Inner()


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no key 'widht'; did you mean 'width'\?"):
        Outer(widht=3)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"'zzz'.*valid names: inner, rate, width"):
        Outer(width=1, zzz=3)  # type: ignore[call-arg]


def test_wrong_value_is_quoted() -> None:
    with pytest.raises(ConfigError, match=r"width='big'"):
        Outer(width="big")  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        Outer(width=1, rate=float("nan"))


class Either(Config):
    several: int | tuple[int | str, ...] = 1
    bounded: Annotated[int, Field(ge=1)] | Literal["auto"] = 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"several": {}}, "Either: several={} is refused"),
        ({"several": (1, None)}, "Either: several=(1, None) is refused"),
        ({"bounded": 0}, "Either: bounded=0 is refused"),
        ({"bounded": "automatic"}, "Either: bounded='automatic' is refused"),
    ],
)
def test_of_a_choice_of_types_the_value_is_named_and_not_the_type(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Either(**values)
    assert str(caught.value).startswith(message)


def test_round_trip_and_digest(tmp_path: Path) -> None:
    config = Outer(width=7, inner=Inner(size=(4, 5)))
    path = tmp_path / "c.json"
    config.dump(path)
    assert Outer.load(path) == config
    assert Outer.load(path).digest() == config.digest() != config.replace(width=8).digest()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ('{"width": "7"}', "width='7'"),
        ('{"width": 7, "inner": {"sise": [1, 2]}}', "did you mean 'size'"),
        ('{"rate": 1.0}', "Outer has no value for 'width'; set it"),
    ],
)
def test_load_is_strict(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Outer.loads(text)


def test_missing_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(LongtakeError, match=r"absent\.json") as caught:
        Outer.load(tmp_path / "absent.json")
    assert caught.value.exit_code == 2


def test_replace_validates() -> None:
    with pytest.raises(ConfigError):
        Outer(width=1).replace(width=None)
