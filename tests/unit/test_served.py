"""What driving an engine's own server promises: no wait without an end, and no process left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from images.catalog import ROOT
from rollout import backends
from rollout.backends import Completion, EngineError, served
from rollout.backends.served import Server, flags, interrupted, last_error

from .web import CUT, Site


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for ever fails a test instead of holding it for minutes."""
    monkeypatch.setattr(served, "TIMEOUT", 10.0)
    monkeypatch.setattr(served, "STOPPING", 5.0)
    monkeypatch.delenv(served.LOG, raising=False)


# arguments and logs


def test_options_become_arguments_of_the_command() -> None:
    options = {
        "enable_memory_saver": True,
        "tp_size": 2,
        "mem_fraction_static": 0.8,
        "load_format": "dummy",
        "random_seed": 0,
        "enable_weights_cpu_backup": False,
    }
    assert flags(options) == [
        *("--enable-memory-saver", "--tp-size", "2", "--mem-fraction-static", "0.8"),
        *("--load-format", "dummy", "--random-seed", "0"),
    ]
    assert flags({}) == []


@pytest.mark.parametrize(
    ("log", "last"),
    [
        ("", ""),
        ("loading\nready\n", ""),
        ("ValueError: no\nRuntimeError: out of memory\nReceived sigquit\n", "RuntimeError: out of"),
        ("  torch.OutOfMemoryError: CUDA out of memory. Tried\n", "torch.OutOfMemoryError: CUDA"),
        ("Traceback\n    raise\nEOFError\nbye\n", "EOFError"),
        ("KeyError: 'a: b'\n", "KeyError: 'a: b'"),
        ("an Error happened: x\nsee the errors: y\n", ""),
        ("ValueError: \ud8ff of bytes\n", "ValueError: "),
    ],
)
def test_the_last_line_of_a_log_that_names_an_exception_is_the_reason(
    tmp_path: Path, log: str, last: str
) -> None:
    path = tmp_path / "engine.log"
    path.write_bytes(log.encode("utf-8", "surrogatepass"))
    assert last_error(path).startswith(last)
    assert bool(last_error(path)) == bool(last)


def test_a_log_that_is_not_there_has_no_reason(tmp_path: Path) -> None:
    assert last_error(tmp_path / "none.log") == ""


def test_a_log_goes_where_the_user_wants_it_or_to_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    one, two = served.log_file(), served.log_file()
    assert one != two
    assert {one.parent, two.parent} == {tmp_path}
    assert one.is_file()
    monkeypatch.setenv(served.LOG, str(tmp_path / "mine.log"))
    assert served.log_file() == tmp_path / "mine.log"
    assert not (tmp_path / "mine.log").exists()


def test_a_free_port_is_one_that_can_be_listened_on() -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer

    HTTPServer(("127.0.0.1", served.free_port()), BaseHTTPRequestHandler).server_close()


@pytest.mark.parametrize(("wanted", "name"), [(False, "Engine"), (True, "Server")])
def test_a_backend_has_an_engine_and_a_server(
    monkeypatch: pytest.MonkeyPatch, wanted: bool, name: str
) -> None:
    module = ModuleType("rollout.backends.some_engine")
    vars(module).update(Engine=lambda: "Engine", Server=lambda: "Server")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    made: Any = backends.create("some-engine", served=wanted)
    assert made == name


# requests


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.close()


class There(Server):
    """A server that a test has started itself."""

    def __init__(self, port: int, log: Path = Path("/nonexistent")) -> None:
        self.port = port
        self.log = log
        self.answered = set()
        self.status: int | None = None
        self._process: Any = SimpleNamespace(poll=lambda: self.status)


@pytest.fixture
def server(site: Site) -> There:
    return There(site.port)


def test_what_is_asked_is_json_and_so_is_the_answer(site: Site, server: There) -> None:
    site.routes["/a"] = lambda body: (200, {"got": body})
    assert server.call("/a") == {"got": None}
    assert server.call("/a", {"x": [1, 2]}) == {"got": {"x": [1, 2]}}
    assert server.call("/a?level=2", {}) == {"got": {}}
    assert site.calls == [("/a", None), ("/a", {"x": [1, 2]}), ("/a?level=2", {})]


@pytest.mark.parametrize(
    ("content", "answer"), [("", ""), ("Cache flushed.\n", "Cache flushed.\n"), ("null", None)]
)
def test_an_answer_that_is_no_json_is_its_text(
    site: Site, server: There, content: str, answer: object
) -> None:
    site.routes["/a"] = lambda _: (200, content)
    assert server.call("/a", {}) == answer


@pytest.mark.parametrize("way", ["call", "events"])
@pytest.mark.parametrize(
    ("status", "content", "said"),
    [
        (400, {"success": False}, '400: {"success": false}'),
        (404, {"detail": "Not Found"}, '404: {"detail": "Not Found"}'),
        (500, "Internal\nServer Error", "500: Internal"),
        (503, "", "503: "),
        (400, "x" * 999, "400: " + "x" * 300),
    ],
    ids=["refused", "unknown", "broken", "without a word", "with many words"],
)
def test_another_status_than_200_is_an_error_with_what_was_said(
    site: Site, server: There, way: str, status: int, content: object, said: str
) -> None:
    site.routes["/a"] = lambda _: (status, content)
    with pytest.raises(EngineError) as caught:
        server.call("/a", {}) if way == "call" else list(server.events("/a", {}))
    assert str(caught.value) == f"the server answered /a with {said}"


@pytest.mark.parametrize("way", ["call", "events"])
def test_a_server_that_is_gone_is_an_error(site: Site, server: There, way: str) -> None:
    site.close()
    with pytest.raises(EngineError, match=r"^the server did not answer /a: .*refused"):
        server.call("/a", {}) if way == "call" else list(server.events("/a", {}))


def test_a_server_that_dies_while_it_answers_is_an_error(site: Site, server: There) -> None:
    site.routes["/a"] = lambda _: (200, CUT)
    with pytest.raises(EngineError, match=r"^the server did not answer /a: IncompleteRead"):
        server.call("/a")


def test_a_server_that_says_nothing_is_an_error(
    site: Site, server: There, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = threading.Event()

    def silent(_: Any) -> tuple[int, str]:
        hangs.wait(10)
        return 200, ""

    monkeypatch.setattr(served, "TIMEOUT", 0.1)
    site.routes["/a"] = silent
    try:
        with pytest.raises(EngineError, match=r"^the server did not answer /a: timed out$"):
            server.call("/a", {})
    finally:
        hangs.set()


def test_a_server_knows_which_paths_it_has_answered(site: Site, server: There) -> None:
    site.routes |= {"/a": lambda _: (200, ""), "/b": lambda _: (400, ""), "/e": lambda _: iter([1])}
    server.call("/a?level=2", {})
    list(server.events("/e", {}))
    with pytest.raises(EngineError):
        server.call("/b", {})
    assert server.answered == {"/a", "/e"}


@pytest.mark.parametrize(
    ("status", "there"), [(200, True), (405, True), (422, True), (500, True), (404, False)]
)
def test_a_path_is_there_unless_the_server_knows_none_of_that_name(
    site: Site, server: There, status: int, there: bool
) -> None:
    site.routes["/pause"] = lambda _: (status, {"detail": "Method Not Allowed"})
    assert server.offers("/pause") is there
    assert site.calls == [("/pause", None)], "nothing is posted, so nothing happens"
    assert server.answered == set()


def test_a_server_that_is_gone_offers_nothing_and_says_so(site: Site, server: There) -> None:
    site.close()
    with pytest.raises(EngineError, match=r"^the server did not answer /pause: .*refused"):
        server.offers("/pause")


def test_events_come_as_they_are_sent(site: Site, server: There) -> None:
    goes_on = threading.Event()

    def events() -> Iterator[Any]:
        yield {"tokens": [1]}
        assert goes_on.wait(10), "the first one was not taken before the second"
        yield {"tokens": [1, 2]}

    site.routes["/generate"] = lambda _: events()
    stream = server.events("/generate", {"stream": True})
    assert next(stream) == {"tokens": [1]}
    goes_on.set()
    assert list(stream) == [{"tokens": [1, 2]}], "and the word at the end is no event"
    assert site.calls == [("/generate", {"stream": True})]


def test_who_closes_the_events_hangs_up(site: Site, server: There) -> None:
    def events() -> Iterator[Any]:
        for number in range(1000):
            yield {"tokens": [number] * 1000}
            time.sleep(0.001)

    site.routes["/generate"] = lambda _: events()
    stream = server.events("/generate", {})
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert eventually(lambda: site.hung_up == ["/generate"])


@pytest.mark.parametrize("events", [[], [1, 2]], ids=["before the first", "behind some"])
def test_events_that_break_off_are_an_error(site: Site, server: There, events: list[int]) -> None:
    site.routes["/generate"] = lambda _: iter([*events, CUT])
    found = []
    with pytest.raises(EngineError, match=r"^the server broke off its answer to /generate$"):
        for event in server.events("/generate", {}):
            found.append(event)
    assert found == events
    site.routes["/generate"] = lambda _: iter(events)
    assert list(server.events("/generate", {})) == events


def test_events_that_are_no_json_are_an_error(site: Site, server: There) -> None:
    site.routes["/generate"] = lambda _: (200, "data: {broken\n\n")
    with pytest.raises(ValueError, match="property name"):
        list(server.events("/generate", {}))


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


# waiting


def test_a_server_is_waited_for_until_it_answers(
    site: Site, server: There, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    answers = [(503, "starting"), (500, ""), (200, CUT), (200, "")]
    site.routes["/health"] = lambda _: answers.pop(0)
    server.wait("/health")
    assert answers == []


def test_a_server_that_ends_is_not_waited_for(site: Site, tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text("ValueError: no such model\nbye\n")
    server = There(site.port, log)
    server.status = 1
    with pytest.raises(EngineError, match=r"^the server ended: ValueError: no such model$"):
        server.wait("/health")
    log.write_text("Killed\n")
    with pytest.raises(EngineError, match=r"^the server ended: without a word$"):
        server.wait("/health")
    assert site.calls == []


def test_a_server_that_ends_meanwhile_is_not_waited_for(
    site: Site, server: There, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(_: float) -> None:
        server.status = -9

    monkeypatch.setattr(time, "sleep", ends)
    with pytest.raises(EngineError, match=r"^the server ended: without a word$"):
        server.wait("/health")
    assert len(site.calls) == 1


def test_a_server_that_never_answers_counts_as_hung(
    server: There, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "TIMEOUT", 0.05)
    with pytest.raises(EngineError, match=r"^the server did not answer /health for 0 s$"):
        server.wait("/health")


# its process

SCRIPT = """\
#!{python}
import http.server, json, os, signal, subprocess, sys
with open({told!r}, "w") as file:
    json.dump([sys.argv[1:], os.environ.get("MODE")], file)
print("starting", flush=True)
print("to stderr", file=sys.stderr, flush=True)
if {mode!r} == "fails":
    sys.exit("ValueError: no such model")
if {mode!r} == "stubborn":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
else:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
child = subprocess.Popen(["sleep", "600"])
with open({child!r} + ".part", "w") as file:
    file.write(str(child.pid))
os.rename({child!r} + ".part", {child!r})

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass

port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class Command:
    """A ``rollout`` beside a Python, and what it left."""

    def __init__(self, folder: Path, mode: str = "") -> None:
        self.folder = folder
        self.told, self.child = folder / "told.json", folder / "child"
        script = folder / "rollout"
        script.write_text(
            SCRIPT.format(
                python=sys.executable, told=str(self.told), child=str(self.child), mode=mode
            )
        )
        script.chmod(0o755)

    def pids(self, server: Server) -> list[int]:
        assert eventually(self.child.exists)
        return [server._process.pid, int(self.child.read_text())]


Make = Callable[..., tuple[Command, Server]]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    made: list[Server] = []

    def start(mode: str = "", argv: Sequence[str] = ()) -> tuple[Command, Server]:
        command = Command(tmp_path, mode)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", str(tmp_path / "python3"))
            server = Server(argv, tmp_path / "engine.log", {"MODE": "development"})
        made.append(server)
        return command, server

    yield start
    for server in made:
        for kill in (server._process.kill, lambda s=server: os.killpg(s._process.pid, 9)):
            try:
                kill()
            except ProcessLookupError:
                continue
        server._process.wait()


def running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_the_command_of_a_user_is_started_on_this_machine_alone(make: Make) -> None:
    import json

    command, server = make(argv=["/model", "--enable-memory-saver"])
    server.wait("/health")
    argv, mode = json.loads(command.told.read_text())
    assert argv == [
        *("serve", "/model", "--enable-memory-saver"),
        *("--host", "127.0.0.1", "--port", str(server.port)),
    ]
    assert mode == "development"
    assert server.log.read_text() == "starting\nto stderr\n", "and nothing on the terminal"
    server.stop()


@pytest.mark.parametrize("mode", ["", "stubborn"], ids=["obedient", "deaf to SIGINT"])
def test_a_server_is_ended_with_its_children_and_harmlessly_twice(
    make: Make, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    command, server = make(mode)
    monkeypatch.setattr(served, "STOPPING", 5.0 if not mode else 0.05)
    pids = command.pids(server)
    assert all(map(running, pids))
    server.stop()
    assert eventually(lambda: not any(map(running, pids)))
    assert server._process.returncode == (-signal.SIGKILL if mode else -signal.SIGINT)
    server.stop()
    with pytest.raises(EngineError, match="the server ended"):
        server.wait("/health")


def test_a_server_that_fails_to_start_says_why(make: Make) -> None:
    _, server = make("fails")
    with pytest.raises(EngineError, match=r"^the server ended: ValueError: no such model$"):
        server.wait("/health")
    server.stop()


def test_a_server_dies_with_the_trainer_that_started_it(tmp_path: Path) -> None:
    command = Command(tmp_path)
    code = (
        "import sys, time; from pathlib import Path; from rollout.backends.served import Server;"
        f" sys.executable = {str(tmp_path / 'python3')!r};"
        f" server = Server([], Path({str(tmp_path / 'engine.log')!r}), {{}});"
        " print(server._process.pid, flush=True); time.sleep(600)"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT / "entrypoints")},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert trainer.stdout is not None
    with trainer.stdout:
        process = int(trainer.stdout.readline())
        assert eventually(command.child.exists)
        assert running(process)
        trainer.kill()
        trainer.wait()
    assert eventually(lambda: not running(process))
    # An engine's children die with their parent, by its own doing; this one's does not.
    os.kill(int(command.child.read_text()), signal.SIGKILL)


# answers that are aborted


def answer(count: int) -> Completion:
    return Completion(tuple(range(count)), (-0.5,) * count)


class Stream:
    """An answer that grows by itself until it is aborted, or comes to an end."""

    def __init__(self, ends: int | None = None, *, begins: int = 1, says: str = "") -> None:
        self.ends, self.begins, self.says = ends, begins, says
        self.aborted = threading.Event()
        self.deaf = False
        self.left = threading.Event()

    def __iter__(self) -> Iterator[Completion]:
        count = self.begins
        while True:
            if self.ends is not None and count > self.ends:
                if self.says:
                    raise KeyError(self.says)
                return
            yield answer(count)
            if self.aborted.is_set():
                break
            count += 1
            time.sleep(0.001)
        while self.deaf:
            if self.left.wait(10):
                return
        yield answer(count + 1)  # the last word of a server, after the abort


Abort = Callable[[], None]


def follow(*streams: Stream, after: int = 4) -> tuple[list[Completion], int]:
    """What there is of the answers, and how often they were aborted."""
    aborts: list[None] = []

    def abort() -> None:
        aborts.append(None)
        for stream in streams:
            stream.aborted.set()

    try:
        return interrupted([iter(stream) for stream in streams], after, abort), len(aborts)
    finally:
        for stream in streams:
            stream.left.set()


def test_answers_are_aborted_once_each_has_enough_and_kept_to_their_last_word() -> None:
    found, aborts = follow(Stream(), Stream(), Stream(begins=3))
    assert aborts == 1
    assert len(found) == 3
    assert all(len(part.tokens) >= 5 for part in found), "what comes after the abort is taken too"


def test_an_answer_that_ends_with_enough_is_one() -> None:
    found, _ = follow(Stream(ends=4), Stream())
    assert found[0] == answer(4)


def test_answers_keep_their_order() -> None:
    found, _ = follow(Stream(begins=50), Stream(begins=4), Stream(begins=90))
    assert [len(part.tokens) // 10 for part in found][::2] == [5, 9]
    assert len(found[1].tokens) < 50


@pytest.mark.parametrize("ends", [0, 1, 3])
def test_an_answer_that_ends_early_is_an_error_and_is_not_waited_for(ends: int) -> None:
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"^the server ended an answer before it had 4 tokens$"):
        follow(Stream(), Stream(ends=ends), after=4)
    assert time.monotonic() - start < 5


def test_all_answers_that_end_early_are_an_error() -> None:
    with pytest.raises(EngineError, match="before it had 4 tokens"):
        follow(Stream(ends=3), Stream(ends=2))


@pytest.mark.parametrize("ends", [0, 2, 9])
def test_an_error_in_one_answer_aborts_all_and_is_told(ends: int) -> None:
    streams = [Stream(), Stream(ends=ends, says="meta_info"), Stream(begins=2)]
    with pytest.raises(EngineError, match=r"^the server ended an answer: 'meta_info'$"):
        follow(*streams, after=20)
    assert all(stream.aborted.is_set() for stream in streams)


def test_a_server_that_dies_in_the_middle_of_an_answer_is_an_error(
    site: Site, server: There
) -> None:
    def events() -> Iterator[Any]:
        yield 1
        yield 2
        yield CUT

    site.routes["/generate"] = lambda _: events()
    stream = (answer(count) for count in server.events("/generate", {}))
    broke = r"^the server ended an answer: the server broke off its answer to /generate$"
    with pytest.raises(EngineError, match=broke):
        interrupted([stream], 4, lambda: None)


def test_an_answer_that_does_not_end_after_its_abort_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(served, "STOPPING", 0.05)
    deaf = Stream()
    deaf.deaf = True
    with pytest.raises(EngineError, match=r"^the server did not end an answer that was aborted$"):
        follow(Stream(), deaf)


def test_answers_that_never_grow_are_aborted_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "TIMEOUT", 0.05)
    with pytest.raises(EngineError, match="before it had 100000 tokens"):
        follow(Stream(), Stream(), after=100000)


def test_no_port_is_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine listens on what it was given only after it has started; the kernel cannot know."""
    numbers = iter([4000, 4000, 4000, 4001])

    class Listener:
        def __enter__(self) -> Listener:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def bind(self, _: object) -> None:
            pass

        def getsockname(self) -> tuple[str, int]:
            return ("127.0.0.1", next(numbers))

    monkeypatch.setattr(served, "_given", set())
    monkeypatch.setattr(served, "socket", SimpleNamespace(socket=Listener))
    assert [served.free_port(), served.free_port()] == [4000, 4001]
