"""Processes for tests that need several: forked from one that has imported all there is, which takes seconds."""

import atexit
import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

LIMIT = 120.0  # seconds until a test says that something hangs
SERVER = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
SERVER.set_forkserver_preload(["timm", "lape.cli.app", "lape.cli.original", "lape.train.loop", "lape.study.compare"])


class Process:
    """A function in a process that leads a session of its own; it has nothing of this one but the arguments."""

    def __init__(self, target: Callable[..., object], *args: object, **variables: str) -> None:
        folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder)
        self._out, self._err = folder / "out", folder / "err"
        self._process = SERVER.Process(target=_call, args=(self._out, self._err, variables, target, args))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    @property
    def output(self) -> str:
        return self._out.read_text() if self._out.exists() else ""

    @property
    def errors(self) -> str:
        return self._err.read_text() if self._err.exists() else ""

    def wait_for(self, text: str) -> None:
        """Until the text is in the output."""
        self.wait_until(lambda: text in self.output, text)

    def wait_until(self, true: Callable[[], bool], what: str = "it") -> None:
        until = time.monotonic() + LIMIT
        while not true():
            assert self.returncode is None, f"{what!r} never came: {self.errors}"
            assert time.monotonic() < until, f"{what!r} does not come: {self.output}"
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self) -> tuple[str, str]:
        """Wait for its end; what it wrote to stdout and stderr."""
        self._process.join(LIMIT)
        if self.returncode is None:
            all_end(self.pid, 0.0)
            raise AssertionError(f"{self.pid} hangs: {self.output} {self.errors}")
        return self.output, self.errors


def _call(
    out: Path, err: Path, variables: dict[str, str], target: Callable[..., object], args: Sequence[object]
) -> None:
    os.setsid()
    for number in (signal.SIGHUP, signal.SIGTERM):  # a shell in the background, and nohup, have some ignored
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(variables)
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    import torch

    torch.set_num_threads(1)
    target(*args)


def with_forks(target: Callable[..., object], *args: object) -> None:
    """What a function starts are forks of this process, which has computed nothing yet; to be given to `Process`."""
    multiprocessing.get_context = lambda _method: SERVER.get_context("fork")  # type: ignore[assignment]
    target(*args)


def lape(*tokens: str) -> None:
    """The command line, to be given to `Process`."""
    from lape.cli.app import app, run

    sys.exit(run(app, tokens))


def main_py(*tokens: str) -> None:
    """That of the original."""
    from lape.cli.app import original, run

    sys.exit(run(original, tokens))


def python(code: str, *arguments: str) -> None:
    """`python -c`, where what takes long to import is there already; to be given to `Process`."""
    sys.argv = ["-c", *arguments]
    exec(compile(code, "-c", "exec"), {"__name__": "__main__"})


def ends_well(target: Callable[..., object], *args: object) -> None:
    """A function in a process of its own, until it has ended well."""
    process = Process(target, *args)
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def launch(processes: int, target: Callable[..., object], *args: object) -> list[Process]:
    """Processes of one run, with the variables that torchrun would give them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    size = {"WORLD_SIZE": str(processes)}
    return [Process(target, *args, **place, **size, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(processes)]


def run_together(processes: int, target: Callable[..., object], *args: object) -> None:
    """Processes of one run, until all have ended well."""
    started = launch(processes, target, *args)
    for process in started:
        _, errors = process.communicate()
        assert process.returncode == 0, errors


def session_of(leader: int) -> list[int]:
    """The processes that a session's leader started and what those started, whoever is their parent by now."""
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                pids.append(int(stat.parent.name))
    return pids


def all_end(leader: int, seconds: float = LIMIT) -> bool:
    """Whether a session ends; what does not is killed."""
    until = time.monotonic() + seconds
    while (left := session_of(leader)) and time.monotonic() < until:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return not left
