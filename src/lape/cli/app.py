"""What every command line here shares: flags from `lape.recipe.Recipe`, exit codes, and errors of one line.

The flags of training and evaluation are generated from `Recipe`, so there is one set of defaults, and those of other
commands from a dataclass of options. Only the flags that were given reach `Recipe`: a YAML recipe keeps the others, and
an evaluation takes them from the checkpoint.
"""

import ast
import contextlib
import errno
import inspect
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Annotated, Any, NoReturn, get_type_hints

from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.exceptions import (
    CoercionError,
    MissingArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)
from pydantic import ValidationError

from lape import __version__
from lape.errors import LapeError, LostError
from lape.names import FILE_SETTINGS, printable
from lape.recipe import Recipe, spelling_of, topic_of, topics

USER_ERROR = 2
INTERRUPTED = 130
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# What an evaluation reads; `lape eval` refuses the rest rather than ignore it.
EVALUATION = (
    *FILE_SETTINGS,
    *("data_path", "data_set", "columns", "inat_category", "batch_size", "num_workers", "pin_mem", "decode"),
    *("ema", "dist_eval", "device", "amp", "attention", "threads"),
)
WITH_CHECKPOINT = ("eval", "predict", "visualize", "export", "probe")
# What every checkpoint says of itself, where it matters.
IN_CHECKPOINTS = (*FILE_SETTINGS, *("pe_std", "pe_norm", "warm_start", "as_original"))
CLOSED_PIPE = 128 + 13  # as if by SIGPIPE

Command = Callable[..., None]
GROUPS = {topic: Group(topic, sort_key=place) for place, topic in enumerate(("Recipe", *topics()))}
UNLESS_GIVEN = Group("From the checkpoint, unless given", sort_key=1)


def takes(names: Iterable[str], from_checkpoint: Iterable[str] = ()) -> Callable[[Command], Command]:
    """Give a command one flag for each of these fields of `Recipe`; it receives those that the user gave.

    The help lists those `from_checkpoint` apart and without a default, which the checkpoint has for them.
    """
    selection, from_checkpoint = set(names), set(from_checkpoint)
    flags = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=_flag(name, name in from_checkpoint)
        )
        for name, field in Recipe.model_fields.items()
        if name in selection
    ]

    def extend(command: Command) -> Command:
        parameters = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]

        def call(*args: Any, **values: Any) -> None:
            command(*args, **values)

        return with_parameters(call, command, [*parameters, *flags])

    return extend


def takes_options(kind: type[Any]) -> Callable[[Command], Command]:
    """Give a command one flag for each field of the frozen dataclass `kind`; its first argument is one of these.

    A field's `help` is in its metadata. A flag that is off has no --no- form.
    """
    hints = get_type_hints(kind)
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


def with_parameters(call: Command, command: Command, parameters: Sequence[inspect.Parameter]) -> Command:
    """`call` under the name and with the help of `command`, and with these parameters."""
    call.__name__, call.__doc__, call.__module__ = command.__name__, command.__doc__, command.__module__
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    call.__signature__ = inspect.signature(command).replace(parameters=parameters)  # type: ignore[attr-defined]
    return call


def _flag(name: str, from_checkpoint: bool) -> Any:
    field = Recipe.model_fields[name]
    settings: dict[str, Any] = {
        "help": field.description,
        "group": UNLESS_GIVEN if from_checkpoint else GROUPS[topic_of(name)],
        "alias": spelling_of(name),
    }
    if from_checkpoint or field.default in (None, "", {}):
        settings["show_default"] = False
    if name == "model_kwargs":
        return Annotated[dict[str, Any], Parameter.combine(KEYWORDS, Parameter(**settings))]
    return Annotated[field.annotation, Parameter(**settings)]


def _keywords(_type: Any, tokens: Sequence[Any]) -> dict[str, Any]:
    """Read KEY=VALUE pairs (a VALUE is a Python or JSON literal, else a string) and JSON objects."""
    keywords: dict[str, Any] = {}
    for text in (token.value for token in tokens):
        key, equals, value = text.partition("=")
        if text.lstrip().startswith("{"):
            try:
                keywords |= json.loads(text)
            except (ValueError, RecursionError) as error:
                raise LapeError(f"{text[:80]!r} is not JSON ({error}); KEY=VALUE pairs do as well") from None
        elif equals and key.replace("-", "_").isidentifier():
            keywords[key.replace("-", "_")] = _literal(value)
        else:
            raise LapeError(f"{text!r} is neither KEY=VALUE nor a JSON object, e.g. embed_dim=64 depth=6")
    return keywords


KEYWORDS = Parameter(converter=_keywords, accepts_keys=False, n_tokens=-1, json_dict=False)
"""Of a flag whose value is a mapping."""


def _literal(text: str) -> Any:
    for parse in (ast.literal_eval, json.loads):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return parse(text)
    return text


def _app(name: str, text: str) -> App:
    return App(
        name=name,
        help=text,
        version=__version__,
        version_flags=("--version", "-V"),
        default_parameter=Parameter(negative_iterable=(), consume_multiple=True, allow_repeating=True),
        result_action="return_value",
        help_format="plaintext",
        exit_on_error=False,
        print_error=False,
        suppress_keyboard_interrupt=False,
    )


app = _app("lape", "Layer-adaptive position embedding for Vision Transformers: convert, train, evaluate, look.")
original = _app("main.py", "The original's command line: train, or evaluate with --eval.")


def main() -> NoReturn:
    """Run `lape`: exit with 0, with 2 after a user's error (one line), with 130 after Ctrl-C."""
    sys.exit(run(app, sys.argv[1:]))


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """stdout and stderr go nowhere where whoever started this process has closed them."""
    with contextlib.ExitStack() as sinks:
        for stream, redirect in ((sys.stdout, contextlib.redirect_stdout), (sys.stderr, contextlib.redirect_stderr)):
            if stream is None:
                sinks.enter_context(redirect(sinks.enter_context(open(os.devnull, "w"))))
        yield


@_streams()
def run(command: App, tokens: Sequence[str]) -> int:
    """Run a command line and return its exit code; nothing but the first process of a launch prints to stdout."""
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks is no reason to end
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _quiet_unless_first():
            _check_folder()
            command(_dashes(tokens))
            sys.stdout.flush()
    except BrokenPipeError:  # `lape hosts | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes at its end goes nowhere
        return CLOSED_PIPE
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            _report(f"{error.filename!r} is no path that can be: {error.strerror}")
            return USER_ERROR
        if error.errno not in FULL:
            raise
        with contextlib.suppress(OSError):  # where stdout is what is full, Python's end would fail on it again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _report(f"cannot write {error.filename or 'the output'}: {error.strerror}; make room, or write elsewhere")
        return USER_ERROR
    except (LapeError, CycloptsError) as error:
        _report(_one_line(error), isinstance(error, LostError))
        return USER_ERROR
    except KeyboardInterrupt:
        if _rank() == 0:
            print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _check_folder() -> None:
    try:
        os.getcwd()
    except OSError:
        raise LapeError("the working folder is gone: change to one that is there") from None


def _dashes(tokens: Sequence[str]) -> list[str]:
    """Spell every flag with dashes: --output_dir=a_b becomes --output-dir=a_b."""
    spelling: list[str] = []
    for place, token in enumerate(tokens):
        if token == "--":
            return [*spelling, *tokens[place:]]
        name, equals, value = token.partition("=")
        spelling.append(name.replace("_", "-") + equals + value if name.startswith("--") else token)
    return spelling


def _rank() -> int:
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0  # what is no number is refused where processes meet


@contextlib.contextmanager
def _quiet_unless_first() -> Iterator[None]:
    if _rank() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _report(message: str, lost: bool = False) -> None:
    """Print one line to stderr. A later process waits: the launcher ends it first if the error is everyone's.

    One that has lost another waits as well, or the launcher would end that one before it can say why.
    """
    if lost:
        _wait_for_launcher()
    elif _rank() > 0:
        time.sleep(3)
    if _rank() > 0:
        message = f"[rank {_rank()}] {message}"
    print(f"error: {printable(message)}", file=sys.stderr, flush=True)


def _wait_for_launcher() -> None:
    """Until it ends this process, too, which then still has something to say; five seconds at most."""
    sigterm = threading.Event()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda _number, _frame: sigterm.set())
    sigterm.wait(5)


def _one_line(error: Exception) -> str:
    if isinstance(error, UnusedCliTokensError):
        return f"unexpected argument(s) {' '.join(error.unused_tokens or ())}: see --help"
    if isinstance(error.__cause__, ValidationError):  # of options: what they raised themselves, in one line
        return str(error.__cause__.errors()[0]["ctx"]["error"])
    text = " ".join(str(error).split())
    argument = getattr(error, "argument", None)
    if isinstance(error, MissingArgumentError | CoercionError) and argument is not None:
        return f"{text.rstrip('.')}; give {_usage(argument)}"
    if isinstance(error, UnknownOptionError) and (reason := _of_training(error)):
        return reason
    if isinstance(error, UnknownOptionError | UnknownCommandError) and "Did you mean" not in text:
        text += " See --help."
    return text


def _of_training(error: UnknownOptionError) -> str:
    """Why a command that takes a checkpoint has no such flag of a training; "" where it is another flag."""
    flag, command = (error.token.keyword or error.token.value).partition("=")[0], " ".join(error.command_chain or ())
    spellings = {name: (f"--{name.replace('_', '-')}", spelling_of(name)) for name in Recipe.model_fields}
    name = next((name for name, spelling in spellings.items() if flag.replace("--no-", "--") in spelling), None)
    if command not in WITH_CHECKPOINT or name is None or name in {*EVALUATION, "resume"} - set(FILE_SETTINGS):
        return ""
    if name in IN_CHECKPOINTS:
        return f"{flag} is what a checkpoint says of itself, and lape {command} takes it from there: leave it out"
    return f"{flag} is of training, and lape {command} trains nothing: leave it out, or give it to lape train"


def _usage(argument: Any) -> str:
    """A flag with a value of its kind, and what it is for."""
    name, default = argument.name, argument.field_info.default
    if argument.hint is bool:
        return f"{name} or --no-{name.removeprefix('--')}, without a value"
    plain = isinstance(default, int | float | str) and default != ""
    value = default if plain else name.removeprefix("--").replace("-", "_").upper()
    return f"{name} {value} ({argument.parameter.help})"
