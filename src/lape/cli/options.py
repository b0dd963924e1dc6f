"""Flags of a command from a dataclass of options, as `lape.cli.app.takes` makes them from `Recipe`."""

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Annotated, Any

from cyclopts import Parameter

from lape.cli.app import KEYWORDS, Command, with_parameters


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
        _first, *others = inspect.signature(command).parameters.values()
        places = [p for p in others if p.kind in (p.VAR_POSITIONAL, p.POSITIONAL_OR_KEYWORD)]
        keywords = [p for p in others if p.kind is p.KEYWORD_ONLY]

        def call(*args: Any, **values: Any) -> None:
            options = kind(**{name: values.pop(name) for name in names & values.keys()})
            command(options, *args, **values)

        return with_parameters(call, command, [*places, *flags, *keywords])

    return extend
