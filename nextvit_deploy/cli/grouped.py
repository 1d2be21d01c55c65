"""Options that belong together as one parameter: the fields of a dataclass, each an option of the command."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_type_hints


def grouped(*groups: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a command take the fields of these dataclasses as options, gathered in its parameters of those types.

    A field is annotated as a parameter of a command is, ``Annotated[int, typer.Option(...)] = 1``. Its options stand
    in the help where the parameter stands in the command.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        gathered = {each.name: each.annotation for each in own.parameters.values() if each.annotation in groups}

        def run(**given: object) -> None:
            for name, group in gathered.items():
                given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
            command(**given)

        parameters = [option for each in own.parameters.values() for option in _options(each, groups)]
        run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
        run.__annotations__ = {each.name: each.annotation for each in parameters} | {"return": None}
        run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]  # what inspect looks for
        return run

    return decorate


def _options(parameter: inspect.Parameter, groups: tuple[type[Any], ...]) -> list[inspect.Parameter]:
    """The parameter itself, or one for each field of its dataclass."""
    group = parameter.annotation
    if group not in groups:
        return [parameter]
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=hints[each.name])
        for each in fields(group)
    ]
