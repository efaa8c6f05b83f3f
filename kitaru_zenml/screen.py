"""The live tree at the bottom of a terminal, below what the flow itself prints.

Drawn by hand rather than by `rich.live`: that takes stdout away from ZenML, which stores a run's output, and starts a thread that the
engine would take for one of the flow's. Here whatever is written to the terminal first lifts the tree away, goes its usual way, and the
next drawing puts the tree back below it.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.text import Text
from rich.tree import Tree

from kitaru_zenml.progress import KEPT, Done, Node, RunProgress, State, stem, words

SIZE = 100, 30  # columns and lines of a terminal that does not say
LATEST = 3  # of many outcomes of one kind, these are still shown while the run goes on
_TURN = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_MARKS: dict[State, tuple[str, str, str]] = {  # mark, mark without Unicode, style
    "finished": ("✓", "+", "green"),
    "replayed": ("↺", "=", "dim"),
    "failed": ("✗", "x", "red"),
}


class Screen:
    """The part of the terminal that the trees of the running flows take. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._terminal: Any = sys.stderr
        self._height = 0  # lines drawn below what was printed
        self._at_line_start = True
        self._writing = 0  # writes of others that are under way
        # Colours as rich finds them for this terminal; the text itself is written by `_write`.
        self._colours = Console(file=self._terminal).color_system if hasattr(self._terminal, "isatty") else None
        self._unicode = "utf" in (getattr(self._terminal, "encoding", None) or "").lower()
        self._undo = [*_replace_std(self._above), *_replace_handlers(self._above)]

    def draw(self, runs: Sequence[RunProgress]) -> None:
        """Show the runs as they are now; not in the middle of a line that the flow prints."""
        with self._lock:
            if self._writing or not self._at_line_start:
                return
            room = max(self._size()[1] - 2, 3)
            lines = [line for run in runs for line in self._tree(run, max(room // len(runs), 3))]
            up = f"\x1b[{self._height}A\r" if self._height else ""
            self._write(up + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
            self._height = len(lines)

    def leave(self, progress: RunProgress) -> None:
        """Put a run's last tree and last words where they stay."""
        with self._lock:
            self._lift()
            if not self._at_line_start:
                self._write("\n")
                self._at_line_start = True
            ending, command = progress.last_words()
            mark, plain, style = _MARKS["finished" if progress.error is None else "failed"]
            last = Text.assemble((f"{mark if self._unicode else plain} ", style), ending, "\n  ", (command, "bold"))
            lines = [*self._tree(progress, max(self._size()[1] - 4, 3), live=False), *self._lines(last)]
            self._write("".join(f"{line}\n" for line in lines))

    def close(self) -> None:
        """Give the terminal back."""
        with self._lock:
            self._lift()
            for undo in reversed(self._undo):
                undo()

    # --- the terminal ---

    def _size(self) -> tuple[int, int]:
        try:
            size = os.get_terminal_size(self._terminal.fileno())
        except (OSError, ValueError, AttributeError):
            return SIZE
        return size.columns or SIZE[0], size.lines or SIZE[1]  # a new pseudo-terminal says 0

    def _write(self, text: str) -> None:
        # The class's own method: ZenML replaced the one of the object by one that stores what is written as the run's output.
        type(self._terminal).write(self._terminal, text)
        self._terminal.flush()

    def _lift(self) -> None:
        if self._height:
            self._write(f"\x1b[{self._height}A\r\x1b[J")
            self._height = 0

    def _above(self, stream: Any) -> _Above:
        return _Above(self, stream)

    def write_above(self, stream: Any, text: str) -> Any:
        """Let something else onto the terminal."""
        with self._lock:
            self._lift()
            self._writing += 1
        try:  # without the lock: ZenML's wrapper around the stream may log, and whoever logs may wait for the lock
            answer = stream.write(text)
            stream.flush()  # what is buffered would come out in the middle of the next tree
        finally:
            with self._lock:
                self._writing -= 1
                if text:
                    self._at_line_start = text.endswith("\n")
        return answer

    # --- the tree ---

    def _lines(self, what: RenderableType) -> list[str]:
        width, height = self._size()
        text = io.StringIO()
        encoding: Any = self._colours
        console = Console(
            file=text, force_terminal=encoding is not None, color_system=encoding, width=max(width - 1, 20), height=height,
            highlight=False, legacy_windows=False,
        )  # fmt: skip
        console.print(what, no_wrap=True, overflow="ellipsis", crop=True)
        return text.getvalue().splitlines()

    def _tree(self, run: RunProgress, room: int, live: bool = True) -> list[str]:
        """A run in at most so many lines: what is in flight first of all."""
        title = Text.assemble((run.flow, "bold"))
        if live:
            title.append(f"  {words(time.monotonic() - run.began)} · {run.facts()}  run {run.run_id}", "dim")
        lines: list[str] = []
        for kept in (KEPT, 5, 2, 0):
            tree = Tree(title, guide_style="dim")
            self._grow_done(tree, run.root, kept, LATEST if live else 0)
            self._grow_open(tree, run.root, kept)
            lines = self._lines(tree)
            if len(lines) <= room:
                return lines
        hidden = len(lines) - room + 1
        return [*lines[: room - 1], *self._lines(Text(f"{'…' if self._unicode else '...'} {hidden} more lines", "dim"))]

    def _grow_done(self, tree: Tree, node: Node, kept: int, latest: int = LATEST) -> None:
        """Of each scope the last `kept` outcomes, but only the `latest` of a kind of which there are too many to show."""
        folded, lines = Counter(node.folded), list[Done]()
        shown: Counter[tuple[State, str]] = Counter()
        for step in reversed(node.done):
            kind = step.state, stem(step.name)
            if len(lines) < kept and (kind not in node.folded or shown[kind] < latest):
                shown[kind] += 1
                lines.append(step)
            else:
                folded[kind] += 1
        for (state, name), count in folded.items():
            tree.add(Text.assemble(*self._mark(state), name, (f"  {count:,} {state}", "dim")))
        for step in reversed(lines):
            tree.add(self._line(step))

    def _grow_open(self, tree: Tree, node: Node, kept: int) -> None:
        """What executes; where there is no room to keep anything, a step and the one that it waits for share a line."""
        now = time.monotonic()
        mark = _TURN[int(now * 5) % len(_TURN)] if self._unicode else "*"
        for child in node.open.values():
            name, innermost = child.name, child
            while not kept and len(innermost.open) == 1:
                (innermost,) = innermost.open.values()
                name = f"{name}/{innermost.name}"
            line = Text.assemble((f"{mark} ", "cyan"), name, (f"  {words(now - innermost.since)}", "dim"))
            if innermost.retries:
                line.append(f"  attempt {innermost.retries + 1}", "yellow")
            branch = tree.add(line)
            if kept:
                self._grow_done(branch, child, kept)
            self._grow_open(branch, innermost, kept)

    def _mark(self, state: State) -> list[tuple[str, str]]:
        mark, plain, style = _MARKS[state]
        return [(f"{mark if self._unicode else plain} ", style)]

    def _line(self, step: Done) -> Text:
        facts = "replayed" if step.state == "replayed" else words(step.seconds or 0)
        facts += f" · {step.inside} steps" if step.inside else ""
        facts += f" · {step.tokens:,} tokens" if step.tokens else ""
        line = Text.assemble(
            *self._mark(step.state), (step.name, "dim" if step.state == "replayed" else ""), (f"  {facts}", "dim")
        )
        if step.retries:
            line.append(f"  {step.retries + 1} attempts", "yellow")
        return line


class _Above:
    """A stream whose writes go above the tree, and else their usual way."""

    def __init__(self, screen: Screen, stream: Any) -> None:
        self._screen, self._stream = screen, stream

    def write(self, text: str) -> Any:
        return self._screen.write_above(self._stream, text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _replace_std(above: Callable[[Any], _Above]) -> list[Callable[[], None]]:
    """Let the program's own output go above the tree, where that is the terminal."""
    undo: list[Callable[[], None]] = []
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or not stream.isatty():
            continue
        replaced = above(stream)
        setattr(sys, name, replaced)

        def restore(name: str = name, stream: Any = stream, replaced: Any = replaced) -> None:
            if getattr(sys, name) is replaced:  # else somebody else has replaced it meanwhile
                setattr(sys, name, stream)

        undo.append(restore)
    return undo


def _replace_handlers(above: Callable[[Any], _Above]) -> list[Callable[[], None]]:
    """The same for log handlers, which hold the stream that they were made with; ZenML's writes past `sys.stdout`."""
    undo: list[Callable[[], None]] = []
    for handler in logging.root.handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            stream = handler.stream
            if isinstance(stream, _Above) or not _is_terminal(stream):
                continue
            handler.setStream(above(stream))
            undo.append(lambda handler=handler, stream=stream: handler.setStream(stream))  # type: ignore[misc]
    return undo


def _is_terminal(stream: Any) -> bool:
    asks = getattr(stream, "isatty", None)
    return bool(asks()) if asks else sys.stdout is not None and sys.stdout.isatty()  # ZenML's stream stands for stdout
