"""What a flow that runs in this process shows of itself: a live tree on a terminal, plain lines in the log elsewhere.

It stands on the critical path of every step, so the hook only appends to a queue. One thread for the whole process takes from the
queues and draws about five times a second. What is kept grows with what is in flight, not with the steps of the run: finished siblings
beyond a few are only counted, and what a finished step did inside is forgotten. Nothing here may ever stop a run.

`KITARU_PROGRESS` chooses: `tree`, `plain`, `0` for nothing; by default the tree where stderr is a terminal (and stdout is
not piped into another program), else plain lines at INFO.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
import stat
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from kitaru_zenml.errors import RunSuspended

if TYPE_CHECKING:
    from kitaru_zenml.journal.records import Usage
    from kitaru_zenml.screen import Screen

logger = logging.getLogger("kitaru_zenml")

T = TypeVar("T")
State = Literal["running", "replayed", "finished", "failed", "retrying", "waiting"]
_WORTH_SAYING: dict[State, str] = {"failed": "failed", "retrying": "failed and is tried again", "waiting": "waits"}
Mode = Literal["tree", "plain", "off"]

KEPT = 15  # siblings with an outcome that a scope remembers one by one
DRAW_EVERY = 0.2  # seconds
FIRST_LINE_AFTER, LINES_EVERY = 1.0, 10.0  # seconds; the pause between plain lines doubles from the one to the other
NAMED = 3  # steps in flight that a plain line names


class Hook(Protocol):
    """What the engine tells of a step: its state, its path for people, and what it consumed."""

    def __call__(self, state: State, step: str, usage: Usage | None = None) -> None:
        """Note it; called from many threads and loops."""


def mode() -> Mode:
    """How progress is shown in this process."""
    chosen = os.environ.get("KITARU_PROGRESS", "").strip().lower()
    if chosen in ("0", "off", "no", "false"):
        return "off"
    if chosen in ("plain", "tree"):
        return "plain" if chosen == "plain" else "tree"
    stream = sys.stderr
    is_terminal = stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    return "tree" if is_terminal and not _is_piped(sys.stdout) else "plain"


def _is_piped(stream: Any) -> bool:
    """Whether stdout goes to another program (`| tee`), which may write to the same terminal, into the tree."""
    try:
        return stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError, AttributeError):
        return False


@contextlib.contextmanager
def shown(flow: str, run_id: str) -> Iterator[RunProgress | None]:
    """Show the progress of a leg while it runs; `None` if it is switched off.

    Args:
        flow: Its name.
        run_id: The run.
    """
    chosen = mode()
    if chosen == "off":
        yield None
        return
    progress = RunProgress(flow, run_id, chosen)
    _painter.add(progress)
    try:
        yield progress
    except BaseException as error:
        progress.ended(error)
        raise
    finally:
        _painter.remove(progress)


# --- what a run has done -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Done:
    """A step that has its outcome."""

    name: str
    state: State
    seconds: float | None
    retries: int
    inside: int  # steps that it made inside, in this leg
    tokens: int


@dataclass(slots=True)
class Node:
    """A step or scope that is open: its body executes."""

    name: str
    since: float
    retries: int = 0
    steps: int = 0  # below it, at any depth
    tokens: int = 0
    open: dict[str, Node] = field(default_factory=dict)
    done: deque[Done] = field(default_factory=deque)
    folded: Counter[tuple[State, str]] = field(default_factory=Counter)

    def close(self, done: Done) -> None:
        """A step inside has its outcome; keep the last few, count the others, and keep failures longest."""
        self.done.append(done)
        if len(self.done) > KEPT:
            oldest = next((d for d in self.done if d.state != "failed"), self.done[0])
            self.done.remove(oldest)
            self.folded[oldest.state, stem(oldest.name)] += 1


class RunProgress:
    """The progress of one leg. `note` is the hook; all else happens in the painting thread."""

    def __init__(self, flow: str, run_id: str, mode: Mode) -> None:
        self.flow, self.run_id, self.mode = flow, run_id, mode
        self.began, self.error, self.took = time.monotonic(), None, None  # type: tuple[float, BaseException | None, float | None]
        self.root = Node(flow, self.began)
        self.counts: Counter[State] = Counter()
        self.tokens, self.cost = 0, 0.0
        self._news: deque[tuple[State, str, Usage | None, float]] = deque()
        self._context = contextvars.copy_context()  # the log lines belong to the run in ZenML's log store, too
        self._next_line, self._pause = self.began + FIRST_LINE_AFTER, FIRST_LINE_AFTER
        self._said: Counter[State] = Counter()

    def note(self, state: State, step: str, usage: Usage | None = None) -> None:
        """The hook: remember that something happened."""
        self._news.append((state, step, usage, time.monotonic()))

    def ended(self, error: BaseException | None) -> None:
        """The leg has ended, with or without an error."""
        if self.took is None:
            self.error, self.took = error, time.monotonic() - self.began

    # --- in the painting thread ---

    def catch_up(self) -> list[str]:
        """Take in what happened; returns what of it is worth a line of its own."""
        worth_saying = []
        for _ in range(len(self._news)):
            state, step, usage, at = self._news.popleft()
            self._take(state, step.split("/"), usage, at)
            if state in _WORTH_SAYING:
                worth_saying.append(f"step {step} {_WORTH_SAYING[state]}")
        return worth_saying

    def _take(self, state: State, path: list[str], usage: Usage | None, at: float) -> None:
        above = [self.root]
        for name in path[:-1]:
            above.append(above[-1].open.setdefault(name, Node(name, at)))
        parent, name = above[-1], path[-1]
        if state == "running" or state == "waiting":
            parent.open.setdefault(name, Node(name, at))
            return
        if state == "retrying":
            parent.open.setdefault(name, Node(name, at)).retries += 1
            self.counts[state] += 1
            return
        found = parent.open.pop(name, None)
        tokens = usage.input_tokens + usage.output_tokens if usage is not None and state != "replayed" else 0
        self.counts[state] += 1
        self.tokens += tokens
        if usage is not None and usage.cost is not None and state != "replayed":
            self.cost += usage.cost
        for node in above:
            node.steps, node.tokens = node.steps + 1, node.tokens + tokens
        seconds = at - found.since if found is not None and state != "replayed" else None
        inside = found.steps if found else 0
        parent.close(Done(name, state, seconds, found.retries if found else 0, inside, tokens + (found.tokens if found else 0)))

    def say(self, line: str) -> None:
        """A line to the log."""
        self._context.copy().run(logger.info, "%s", line)

    def speak(self, worth_saying: list[str]) -> None:
        """Plain lines: each failure and retry at once, but no more than a few; the rest in a line now and then."""
        for line in worth_saying[:5]:
            self.say(f"{self.flow}: {line}")
        if len(worth_saying) > 5:
            self.say(f"{self.flow}: {len(worth_saying) - 5} more steps failed")
        now = time.monotonic()
        if now >= self._next_line and self.counts != self._said:
            self._said = Counter(self.counts)
            self._pause = min(2 * self._pause, LINES_EVERY)
            self._next_line = now + self._pause
            self.say(f"{self.flow}: {self.facts()}{_named(self.root)}")

    # --- in words ---

    @property
    def ran(self) -> int:
        """Steps that got their outcome in this leg."""
        return self.counts["finished"] + self.counts["failed"]

    def facts(self) -> str:
        """The numbers of the leg so far."""
        facts = [f"{self.ran} ran"]
        if self.counts["replayed"]:
            facts.append(f"{self.counts['replayed']} replayed")
        if self.counts["failed"]:
            facts.append(f"{self.counts['failed']} failed")
        if self.counts["retrying"]:
            facts.append(_many(self.counts["retrying"], "retry", "retries"))
        if self.tokens:
            facts.append(f"{self.tokens:,} tokens" + (f", ${self.cost:.4f}" if self.cost else ""))
        return ", ".join(facts)

    def last_words(self) -> tuple[str, str]:
        """How the leg ended, and what to type next."""
        took = words(self.took or 0)
        if isinstance(self.error, RunSuspended):
            names = ", ".join(name for _, name in self.error.waits)
            return f"{self.flow} is suspended after {took}, it waits for {names}: {self.facts()}", f"kitaru waits {self.run_id}"
        if self.error is None:
            return f"{self.flow} finished in {took}: {self.facts()}", f"kitaru show {self.run_id}"
        ending = f"{self.flow} ended after {took} with {type(self.error).__name__}: {self.facts()}"
        return ending, f"kitaru failure {self.run_id}"


def _many(count: int, one: str, more: str) -> str:
    return f"{count:,} {one if count == 1 else more}"


def stem(name: str) -> str:
    """What equal steps share in a tree: `fetch` of `fetch#3` and of `fetch[key]`."""
    return name.partition("[")[0].partition("#")[0]


def words(seconds: float) -> str:
    """A duration for a person."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {rest:02} s"


def _named(root: Node) -> str:
    leaves = list(_leaves(root, ""))
    if not leaves:
        return ""
    more = f" and {len(leaves) - NAMED} more" if len(leaves) > NAMED else ""
    return f"; {len(leaves)} in flight: {', '.join(leaves[:NAMED])}{more}"


def _leaves(node: Node, path: str) -> Iterator[str]:
    for child in node.open.values():
        yield from _leaves(child, f"{path}{child.name}/") if child.open else (path + child.name,)


# --- who draws -----------------------------------------------------------------------------------------------------------


class _Painter:
    """The thread that shows the runs of this process, as long as there are any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: list[RunProgress] = []
        self._awake: threading.Event | None = None
        self._screen: Screen | None = None

    def add(self, progress: RunProgress) -> None:
        with self._lock:
            self._runs.append(progress)
            if progress.mode == "tree" and self._screen is None:
                self._screen = _or_none(_open_screen)
            if self._awake is None:
                self._awake = threading.Event()
                # By this name the engine knows that the thread makes no durable calls.
                threading.Thread(target=self._paint, args=(self._awake,), name="kitaru-progress", daemon=True).start()

    def remove(self, progress: RunProgress) -> None:
        """Show the end of a run, in the thread that ran it: what follows it on the terminal follows its last line."""
        with self._lock:
            self._runs.remove(progress)
            screen, is_last = self._screen, not any(run.mode == "tree" for run in self._runs)
            _or_none(lambda: self._finish(progress, screen))
            if is_last and screen is not None:
                self._screen = None
                _or_none(screen.close)
            if not self._runs and self._awake is not None:
                self._awake.set()
                self._awake = None

    def _finish(self, progress: RunProgress, screen: Screen | None) -> None:
        worth_saying = progress.catch_up()
        if progress.error is not None and not progress.counts:
            return  # it never began: the error says all
        if progress.mode == "tree" and screen is not None:
            screen.leave(progress)
            return
        progress.speak(worth_saying)
        ending, command = progress.last_words()
        progress.say(f"{ending}. Look at it with `{command}`.")

    def _paint(self, stopped: threading.Event) -> None:
        while not stopped.wait(DRAW_EVERY):
            with self._lock:
                if stopped.is_set():
                    return
                _or_none(self._paint_once)

    def _paint_once(self) -> None:
        for run in self._runs:
            worth_saying = run.catch_up()
            if run.mode == "plain":
                run.speak(worth_saying)
        if self._screen is not None:
            self._screen.draw([run for run in self._runs if run.mode == "tree"])


def _open_screen() -> Screen:
    from kitaru_zenml.screen import Screen

    return Screen()


def _or_none(work: Callable[[], T]) -> T | None:
    """Do it; what goes wrong in showing progress is nobody's problem."""
    try:
        return work()
    except Exception:
        logger.debug("progress could not be shown", exc_info=True)
        return None


_painter = _Painter()
