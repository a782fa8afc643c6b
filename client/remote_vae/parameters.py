"""Query parameters, read as what they are meant to be: lists in three spellings, booleans in any case, numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from remote_vae.errors import BadRequest


class Parameters:
    """Typed reading of query parameters; what cannot be read is a BadRequest that names the parameter."""

    def __init__(self, query: Iterable[tuple[str, str]]) -> None:
        self._values: dict[str, list[str]] = {}
        for name, value in query:
            self._values.setdefault(name, []).append(value)

    def text(self, name: str) -> str | None:
        values = self._values.get(name)
        return values[-1].strip() if values else None

    def integers(self, name: str) -> tuple[int, ...] | None:
        values = self._values.get(name)
        if not values:
            return None
        parts = [part for value in values for part in value.strip().strip("[]()").split(",")]
        try:
            return tuple(int(part) for part in parts)
        except ValueError:
            raise BadRequest(f"{name} is {','.join(values)[:80]!r}; expected whole numbers", parameter=name) from None

    def integer(self, name: str) -> int | None:
        values = self.integers(name)
        if values is not None and len(values) != 1:
            raise BadRequest(f"{name} has {len(values)} values; expected one", parameter=name)
        return values[0] if values else None

    def number(self, name: str) -> float | None:
        value = self.text(name)
        if value is None:
            return None
        try:
            return float(value)
        except ValueError:
            raise BadRequest(f"{name} is {value[:80]!r}; expected a number", parameter=name) from None

    def boolean(self, name: str) -> bool | None:
        value = self.text(name)
        if value is None:
            return None
        if value.lower() not in ("true", "1", "false", "0"):
            raise BadRequest(f"{name} is {value[:80]!r}; expected true or false", parameter=name)
        return value.lower() in ("true", "1")

    def choice(self, name: str, default: str, choices: Mapping[str, str]) -> str:
        value = self.text(name)
        if value is None:
            return default
        if value.lower() not in choices:
            raise BadRequest(f"{name} is {value[:80]!r}; expected one of {', '.join(choices)}", parameter=name)
        return choices[value.lower()]
