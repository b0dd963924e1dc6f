"""Flags of a command from a dataclass of options, as `lape.cli.app.takes` makes them from `Recipe`."""

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Annotated, Any

from cyclopts import Parameter

from lape.cli.app import Command, _keywords

KEYWORDS = Parameter(converter=_keywords, accepts_keys=False, n_tokens=-1, json_dict=False)


def takes_options(kind: type[Any]) -> Callable[[Command], Command]:
    """Give a command one flag for each field of the frozen dataclass `kind`; its first argument is one of these.

    A field's `help` is in its metadata. A flag that is off has no --no- form.
    """
    hints = typing.get_type_hints(kind)
    flags = []
    for entry in fields(kind):
        hint, how = hints[entry.name], Parameter(help=entry.metadata["help"])
        if hint == Mapping[str, Any] | None:
            hint, how = dict[str, Any] | None, Parameter.combine(KEYWORDS, how)
        elif entry.default is False:
            how = Parameter.combine(how, Parameter(negative=()))
        default = inspect.Parameter.empty if entry.default is MISSING else entry.default
        flags.append(
            inspect.Parameter(
                entry.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, how]
            )
        )
    names = {flag.name for flag in flags}

    def extend(command: Command) -> Command:
        signature = inspect.signature(command)
        _first, *others = signature.parameters.values()
        places = [p for p in others if p.kind in (p.VAR_POSITIONAL, p.POSITIONAL_OR_KEYWORD)]
        keywords = [p for p in others if p.kind is p.KEYWORD_ONLY]

        def call(*args: Any, **given: Any) -> None:
            options = kind(**{name: given.pop(name) for name in names & given.keys()})
            command(options, *args, **given)

        call.__name__, call.__doc__, call.__module__ = command.__name__, command.__doc__, command.__module__
        parameters = [*places, *flags, *keywords]
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return call

    return extend
