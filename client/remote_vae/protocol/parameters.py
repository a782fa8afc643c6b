"""Request parameters, each declared once: name, meaning, JSON schema, how it is read. The parser reads by the declaration and
`GET /openapi.json` prints it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from remote_vae.errors import BadRequest

T = TypeVar("T")
Values = Mapping[str, Sequence[str]]
"""What was sent: the values of each name, in order."""


@dataclass(frozen=True)
class Parameter(Generic[T]):
    """A request parameter: its name, its JSON schema and how its value is read from a query.

    Attributes:
        meaning: for people; the default is said in it.
        schema: JSON schema of one value.
        read: from the values sent under the name. Raises BadRequest naming it.
        aliases: deprecated names, the oldest first, under which it is read all the same.
    """

    name: str
    meaning: str
    schema: Mapping[str, Any]
    read: Callable[[str, Sequence[str]], T]
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The name, and its aliases."""
        return (self.name, *self.aliases)

    @property
    def wire_name(self) -> str:
        """The name that our clients send: the oldest, since a server that is older than the newest knows no other."""
        return self.aliases[0] if self.aliases else self.name

    def of(self, values: Values) -> T | None:
        """The value that was sent; None where there is none. Raises BadRequest naming the parameter as it was sent."""
        if self.name not in values and not self.aliases:  # most are not sent
            return None
        read = {name: self.read(name, values[name]) for name in self.names if values.get(name)}
        return self.one_of(read)

    def one_of(self, values: Mapping[str, T]) -> T | None:
        """The value that was given under any of the names, None where there is none. Raises BadRequest where two differ."""
        if len({repr(value) for value in values.values()}) > 1:
            raise BadRequest(f"{' and '.join(values)} are one parameter, and differ; send {self.name} alone",
                             parameter=self.name)  # fmt: skip
        return next(iter(values.values()), None)


def collect(query: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Pairs of a query string by name; repeated keys stay in order."""
    values: dict[str, list[str]] = {}
    for name, value in query:
        values.setdefault(name, []).append(value)
    return values


def without_aliases(known: Iterable[Parameter[Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    """Values by name, those that came under an alias under the parameter's own name; a name that is unknown stays as it is.

    Raises:
        BadRequest: one parameter has two values.
    """
    canonical = dict(given)
    for parameter in known:
        if any(alias in given for alias in parameter.aliases):
            values = {name: canonical.pop(name) for name in parameter.names if name in given}
            canonical[parameter.name] = parameter.one_of({n: value for n, value in values.items() if value is not None})
    return canonical


def text(name: str, meaning: str, examples: Iterable[str] = ()) -> Parameter[str]:
    schema: dict[str, Any] = {"type": "string"}
    if known := list(examples):
        schema["enum"] = known
    return Parameter(name, meaning, schema, lambda name, sent: sent[-1].strip())


def integers(name: str, meaning: str) -> Parameter[tuple[int, ...]]:
    """Repeated keys, a JSON list and a comma list are all lists."""
    return Parameter(name, meaning, {"type": "array", "items": {"type": "integer"}}, _integers)


def integer(name: str, meaning: str, **bounds: int) -> Parameter[int]:
    """`bounds`: words of JSON schema, such as `minimum`; who holds the value keeps them."""

    def read(name: str, sent: Sequence[str]) -> int:
        values = _integers(name, sent)
        if len(values) != 1:
            raise BadRequest(f"{name} has {len(values)} values; expected one", parameter=name)
        return values[0]

    return Parameter(name, meaning, {"type": "integer", **bounds}, read)


def number(name: str, meaning: str, **bounds: float) -> Parameter[float]:
    """`bounds` as of `integer`."""

    def read(name: str, sent: Sequence[str]) -> float:
        try:
            return float(sent[-1])
        except ValueError:
            raise BadRequest(f"{name} is {sent[-1][:80]!r}; expected a number", parameter=name) from None

    return Parameter(name, meaning, {"type": "number", **bounds}, read)


def boolean(name: str, meaning: str) -> Parameter[bool]:
    """In any case, as `requests` writes Python's and JavaScript writes its own."""

    def read(name: str, sent: Sequence[str]) -> bool:
        value = sent[-1].strip().lower()
        if value not in ("true", "1", "false", "0"):
            raise BadRequest(f"{name} is {sent[-1][:80]!r}; expected true or false", parameter=name)
        return value in ("true", "1")

    return Parameter(name, meaning, {"type": "boolean"}, read)


def choice(name: str, meaning: str, choices: Mapping[str, T]) -> Parameter[T]:
    """One of a few words, in any case, and what each stands for."""

    def read(name: str, sent: Sequence[str]) -> T:
        value = sent[-1].strip().lower()
        if value not in choices:
            raise BadRequest(f"{name} is {sent[-1][:80]!r}; expected one of {', '.join(choices)}", parameter=name)
        return choices[value]

    return Parameter(name, meaning, {"type": "string", "enum": list(choices)}, read)


def _integers(name: str, sent: Sequence[str]) -> tuple[int, ...]:
    parts = [part for value in sent for part in value.strip().strip("[]()").split(",")]
    try:
        return tuple(int(part) for part in parts)
    except ValueError:
        raise BadRequest(f"{name} is {','.join(sent)[:80]!r}; expected whole numbers", parameter=name) from None
