"""The loop of `kitaru worker`: find what is due, decide, start, and see how it ended.

Everything it knows beyond the journals is a matter of time: since when it has seen a run as it is, what runs as its child. So it may
die at any point. A hint stays in the store until the run needs nothing, or has another hint; two workers that start one run both ask
for its lease, which one of them gets.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from zenml.enums import ExecutionStatus
from zenml.models import PipelineRunResponse

from kitaru_zenml import conditions, leg
from kitaru_zenml.errors import KitaruError, StoreUnavailable
from kitaru_zenml.journal.inbox import Inbox
from kitaru_zenml.journal.journal import Journal
from kitaru_zenml.runs import PARENT, flow_options, run_stack
from kitaru_zenml.worker import metrics as numbers
from kitaru_zenml.worker.agenda import Agenda
from kitaru_zenml.worker.answers import Answers
from kitaru_zenml.worker.child import Order, Outcome
from kitaru_zenml.worker.children import STOP_PATIENCE, Children
from kitaru_zenml.worker.needs import (
    Asked,
    Decision,
    Facts,
    GiveUp,
    Later,
    Leave,
    Moment,
    Start,
    count_crashes,
    decide,
    is_alive,
    read_facts,
)
from kitaru_zenml.worker.settings import Settings
from kitaru_zenml.worker.watched import Runs, Watched, open_watched

logger = logging.getLogger("kitaru_zenml.worker")

STALE = 3.0  # seconds after which a decision to start is made anew
PROBLEM_PAUSE, MAX_PROBLEM_PAUSE = 2.0, 300.0  # seconds before a run, or ZenML, is asked again that gave an error
SWEEP_RATE = 1.0  # runs a second that a sweep looks at, so that many suspended runs cost little; the first sweep hurries
SWEEP_RETRY = 30.0  # seconds before another when one was cut off by an error
FIRST_SWEEP = 0.1  # seconds of each turn that the first sweep takes
STUCK = 60.0  # seconds without a turn of the loop after which the worker is not well
REMEMBERED = 3600.0  # seconds that a run is remembered which was not looked at


@dataclass
class _Seen:
    """What the worker remembers of a run between two looks."""

    mark: tuple[Any, ...]
    since: float  # monotonic
    at: float  # monotonic, of the last look
    problems: int = 0
    not_before: float = 0.0


@dataclass(frozen=True)
class _Ready:
    """A run that is to be started as soon as there is room."""

    order: Order
    agenda: Agenda
    limit: str | None
    decided: float
    due: float


class Worker:
    """One worker.

    Args:
        settings: How it works.
        children: Its processes, which get warm while this one does.
    """

    def __init__(self, settings: Settings, children: Children) -> None:
        self.settings, self.children = settings, children
        self.metrics = numbers.Metrics()
        self.runs: Runs
        self._agendas: dict[str, Agenda] = {}  # by artifact store
        self._seen: dict[str, _Seen] = {}
        self._ready: dict[str, _Ready] = {}
        self._of: dict[str, Agenda] = {}  # runs that are executed -> agenda of their store
        self._again: dict[str, Agenda] = {}  # runs whose child has just ended
        self._foreign: set[str] = set()  # runs that are no kitaru flows, or not of this ZenML
        self._next_answers = 0.0
        self._answer_problems = 0
        self._sweep: Iterator[None] | None = None
        self._next_sweep, self._is_first_sweep, self._next_swept = 0.0, True, 0.0
        self._began = time.monotonic()
        self._stopping: float | None = None  # since when
        self._signals = 0
        self._turned = time.monotonic()

    # --- from start to end ---

    def run(self) -> dict[str, Any]:
        """Work until a signal says to stop.

        Returns:
            How it ended, for the command line.

        Raises:
            InvalidWorkerSettings: If it cannot work as told.
        """
        woken = self._listen_for_signals()
        try:
            self._open()
            server = numbers.serve(self.settings.http, self.metrics, self.health) if self.settings.http else None
            where = f", health and metrics on port {server.server_port}" if server else ""
            self._say(
                f"worker is up in {time.monotonic() - self._began:.1f} s: {self.settings.concurrency} runs at once, watching "
                f"{', '.join(a.store.uri for a in self._agendas.values())}{where}",
                event="up",
            )
            while self._stopping is None:
                self._turn()
                self.children.wait(self._pause(), woken)
                self._drain_pipe(woken)
            self._end(woken)
            if server is not None:
                server.shutdown()
        finally:
            self.children.close()
        return {"status": "stopped"}

    def _open(self) -> None:
        leg.warm_up()
        watched: list[Watched] = open_watched(self.settings.stacks)
        self._agendas = {w.store.uri: Agenda(w.store, self.settings.poll) for w in watched}
        self.runs = Runs(watched)
        self.answers = Answers(self.runs.journal_of)

    def _listen_for_signals(self) -> int:
        woken, wake_up = os.pipe()
        os.set_blocking(wake_up, False)
        os.set_blocking(woken, False)
        signal.set_wakeup_fd(wake_up, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        return woken

    def _on_signal(self, *_: object) -> None:
        self._signals += 1
        if self._stopping is None:
            self._stopping = time.monotonic()

    def _drain_pipe(self, woken: int) -> None:
        try:
            while os.read(woken, 512):
                pass
        except BlockingIOError:
            pass

    def _end(self, woken: int) -> None:
        """Let what runs end, then ask it to, then make it."""
        patience = self.settings.drain_timeout if self.settings.drain else 0.0
        busy = self.children.at_work
        self._say(f"stopping: {busy} run{'s' if busy != 1 else ''} may go on for {patience:g} s", event="draining")
        self.children.close_spare()
        self._ready.clear()
        self._wait_for_children(patience, woken)
        if self.children.at_work:
            self.children.ask_to_stop()
            self._wait_for_children(STOP_PATIENCE, woken)
        if self.children.at_work:
            self.children.kill()
            self._take_in_ends()
        self._say("stopped", event="stopped")

    def _wait_for_children(self, seconds: float, woken: int) -> None:
        deadline, signals = time.monotonic() + seconds, self._signals
        while self.children.at_work and time.monotonic() < deadline and self._signals == signals:
            self.children.wait(min(1.0, max(0.0, deadline - time.monotonic())), woken)
            self._drain_pipe(woken)
            self._take_in_ends()
            self._note_gauges()

    def health(self) -> tuple[bool, dict[str, Any]]:
        """Whether the worker is well, and what it is doing."""
        idle = time.monotonic() - self._turned
        well = idle < STUCK or self._stopping is not None
        status = "draining" if self._stopping is not None else "ok" if well else "stuck"
        return well, {
            "status": status,
            "running": self.children.at_work,
            "waiting": len(self._ready),
            "seconds_since_last_turn": round(idle, 1),
        }

    # --- a turn ---

    def _turn(self) -> None:
        self._turned = time.monotonic()
        self._take_in_ends()
        for agenda in self._agendas.values():
            if self._turned >= agenda.next_read or self._again:
                self._read(agenda)
        if self._turned >= self._next_answers:
            self._take_over_answers()
        self._sweep_on()
        self._start_ready()
        self.children.keep_spare()
        self._note_gauges()
        self._forget_old()

    def _pause(self) -> float:
        """Seconds until the next thing to do."""
        due = [agenda.next_read for agenda in self._agendas.values()] + [self._next_answers]
        if self._sweep is not None:
            due.append(self._next_swept)
        return min(max(0.0, min(due) - time.monotonic()), 1.0)

    def _read(self, agenda: Agenda) -> None:
        """Look at every run of a store that is due."""
        try:
            agenda.read()
        except StoreUnavailable as problem:
            self._problem(f"the hints cannot be listed: {problem}")
            return
        again = [run_id for run_id, of in self._again.items() if of is agenda]
        for run_id in again:
            del self._again[run_id]
        for run_id in dict.fromkeys([*again, *agenda.due()]):
            if len(self._ready) >= 4 * self.settings.concurrency:
                return  # enough to do; the hints stay
            self._look(run_id, agenda)

    def _look(self, run_id: str, agenda: Agenda, status: ExecutionStatus | None = None) -> None:
        """Look at one run, and do what is to be done about it.

        Args:
            run_id: Of the run.
            agenda: Of its store.
            status: In ZenML, if it is known.
        """
        seen = self._seen.get(run_id)
        if run_id in self.children.busy or run_id in self._ready or run_id in self._foreign:
            return
        if seen is not None and time.monotonic() < seen.not_before:
            return
        self.metrics.add("kitaru_worker_looks_total")
        try:
            decision, run = self._decide(run_id, agenda, status)
            if status is not None and isinstance(decision, Start | GiveUp):  # it was listed a while ago
                decision, run = self._decide(run_id, agenda, None)
            self._follow(run_id, agenda, decision, run)
        except Exception as problem:
            self._put_aside(run_id, problem)

    def _decide(
        self, run_id: str, agenda: Agenda, status: ExecutionStatus | None
    ) -> tuple[Decision | None, PipelineRunResponse | None]:
        """What the run needs; no decision for one that is not ours."""
        journal = Journal(agenda.store, run_id)
        facts = read_facts(journal)
        run: PipelineRunResponse | None = None
        if not is_alive(facts, self._unchanged(run_id, facts, None)) and (status is None or facts.lease is None):
            run = self.runs.find(run_id)
            if run is None or flow_options(run) is None:
                return None, run
            status = run.status
        unchanged = self._unchanged(run_id, facts, status)
        ask = Asked(
            lambda: count_crashes(journal), self.runs.not_ended, lambda: run is not None and self._begins_here(run, agenda)
        )
        status = status or ExecutionStatus.RUNNING  # somebody executes it: what ZenML says does not matter
        return decide(facts, status, Moment(unchanged), ask, self.settings.max_crashes), run

    def _begins_here(self, run: PipelineRunResponse, agenda: Agenda) -> bool:
        """Whether a run that never began is ours to begin: a parent that lives, or a remote orchestrator, sees to its own."""
        if (parent := (run.config.extra or {}).get(PARENT)) is not None:
            return not is_alive(read_facts(Journal(agenda.store, str(parent))), 0.0)
        return leg.runs_in_process(run_stack(run))

    def _unchanged(self, run_id: str, facts: Facts, status: ExecutionStatus | None) -> float:
        """For how many seconds the run has been seen as it is."""
        now, seen = time.monotonic(), self._seen.get(run_id)
        mark = (facts.mark, status)
        if seen is None or seen.mark[0] != mark[0] or (status is not None and seen.mark[1] not in (None, status)):
            seen = self._seen[run_id] = _Seen(mark, now, now)
        elif status is not None and seen.mark[1] is None:
            seen.mark = mark
        seen.at = now
        return now - seen.since

    def _follow(self, run_id: str, agenda: Agenda, decision: Decision | None, run: PipelineRunResponse | None) -> None:
        match decision:
            case None:
                self._foreign.add(run_id)
                agenda.unknown(run_id)
            case Leave(why):
                agenda.drop(run_id)
                self._debug(run_id, f"left alone: {why}")
            case Later(at, why):
                agenda.put_off(run_id, at)
                self._debug(run_id, f"looked at again at {at:%H:%M:%S} UTC: {why}")
            case Start(why, watched):
                self._make_ready(Order(run_id, "continue", why, watched), agenda, run)
            case GiveUp(why, watched):
                self._make_ready(Order(run_id, "give up", why, watched), agenda, run)

    def _make_ready(self, order: Order, agenda: Agenda, run: PipelineRunResponse | None) -> None:
        run = run or self.runs.find(order.run_id)
        if run is None:
            return
        options, now = flow_options(run), time.monotonic()
        limit = options.limit if options is not None and order.do == "continue" else None
        self._ready[order.run_id] = _Ready(order, agenda, limit, now, now)

    def _put_aside(self, run_id: str, problem: Exception) -> None:
        """Something about this run cannot be read now; the others go on."""
        now = time.monotonic()
        seen = self._seen.setdefault(run_id, _Seen((), now, now))
        pause = min(PROBLEM_PAUSE * 2**seen.problems, MAX_PROBLEM_PAUSE)
        seen.problems, seen.not_before = seen.problems + 1, now + pause
        self._problem(f"cannot be looked at; again in {pause:g} s: {_said(problem)}", run_id)

    # --- children ---

    def _start_ready(self) -> None:
        for run_id, ready in list(self._ready.items()):
            if self.children.at_work >= self.settings.concurrency:
                break
            size = self.settings.limits.get(ready.limit) if ready.limit is not None else None
            if ready.limit is not None and size is not None and self.children.count(ready.limit) >= size:
                continue
            del self._ready[run_id]
            if time.monotonic() - ready.decided > STALE:  # another worker may have taken it meanwhile
                self._look(run_id, ready.agenda)
                if (fresh := self._ready.pop(run_id, None)) is None:
                    continue
                ready = _Ready(fresh.order, ready.agenda, fresh.limit, fresh.decided, ready.due)
            self._start(ready)

    def _start(self, ready: _Ready) -> None:
        order = ready.order
        self.children.give(order, ready.limit)
        self._of[order.run_id] = ready.agenda
        delay = time.monotonic() - ready.due
        self.metrics.add("kitaru_worker_start_delay_seconds_sum", delay)
        self.metrics.add("kitaru_worker_started_total" if order.do == "continue" else "kitaru_worker_given_up_total")
        verb = "continued" if order.do == "continue" else "given up"
        self._say(f"run {order.run_id} {verb}: {order.why}", run=order.run_id, event=verb, why=order.why)

    def _take_in_ends(self) -> None:
        for order, outcome, seconds in self.children.ended():
            self.metrics.add("kitaru_worker_ended_total", how=outcome.how)
            self._say_end(order, outcome, seconds)
            now = time.monotonic()
            if outcome.how == "unavailable":
                self._put_aside(order.run_id, KitaruError(outcome.detail))
            elif (seen := self._seen.get(order.run_id)) is not None:
                seen.problems, seen.at = 0, now
            self._again[order.run_id] = self._of.pop(order.run_id)

    def _say_end(self, order: Order, outcome: Outcome, seconds: float) -> None:
        detail = f": {outcome.detail}" if outcome.detail else ""
        level = logging.WARNING if outcome.how in ("crashed", "failed", "unavailable") else logging.INFO
        text = f"run {order.run_id} {outcome.how} after {seconds:.1f} s{detail}"
        facts = {"run": order.run_id, "event": "ended", "outcome": outcome.how, "seconds": round(seconds, 3)}
        logger.log(level, "%s", text, extra=facts)

    # --- answers given in ZenML ---

    def _take_over_answers(self) -> None:
        now = time.monotonic()
        try:
            taken = self.answers.take_over()
        except Exception as problem:
            self._answer_problems += 1
            pause = min(self.settings.answers * 2**self._answer_problems, 60.0)
            self._next_answers = now + pause
            self._problem(f"ZenML's answers cannot be read; again in {pause:g} s: {_said(problem)}")
            return
        self._answer_problems, self._next_answers = 0, now + self.settings.answers
        if taken:
            self.metrics.add("kitaru_worker_answers_total", taken)
            for agenda in self._agendas.values():
                self._read(agenda)

    # --- the sweep ---

    def _sweep_on(self) -> None:
        """Go on with the sweep: quickly at the start, then little by little."""
        now = time.monotonic()
        if self._sweep is None:
            if now < self._next_sweep:
                return
            self._sweep, self._next_sweep, self._next_swept = self._sweeping(), now + self.settings.sweep, now
        while self._sweep is not None and time.monotonic() >= self._next_swept:
            try:
                next(self._sweep)
            except StopIteration:
                self._sweep = None
                if self._is_first_sweep:
                    self._is_first_sweep = False
                    took = time.monotonic() - self._began
                    self._say(f"every unfinished run was looked at, {took:.1f} s after the start", event="swept")
                return
            except Exception as problem:
                self._sweep, self._next_sweep = None, now + SWEEP_RETRY
                self._problem(f"the sweep over unfinished runs stopped; again in {SWEEP_RETRY:g} s: {_said(problem)}")
                return
            if self._is_first_sweep:
                if time.monotonic() - now > FIRST_SWEEP:
                    self._next_swept = time.monotonic()
                    return
            else:
                self._next_swept = time.monotonic() + 1 / SWEEP_RATE

    def _sweeping(self) -> Iterator[None]:
        """Look at every unfinished run, one a step: what lost its hint is found again."""
        found = list(self.runs.unfinished())
        asked = self.runs.asked()
        for run, watched in found:
            run_id, agenda = str(run.id), self._agendas[watched.store.uri]
            if run_id in self._foreign or run_id in self.children.busy or run_id in self._ready:
                continue
            if run.status == ExecutionStatus.PAUSED and run_id not in asked:
                self._take_over_missed(run, Journal(watched.store, run_id))
            self._look(run_id, agenda, run.status)
            yield

    def _take_over_missed(self, run: PipelineRunResponse, journal: Journal) -> None:
        """A paused run asks nothing in ZenML: if it waits for an answer, that was given there while nobody looked."""
        waits = [wait for wait in read_facts(journal).waits if wait.kind == "wait"]
        if not waits:
            return
        inbox = Inbox(journal)
        inbox.refresh()
        if not conditions.adopt_resolved(run, journal, waits, inbox):
            conditions.post_next(run, journal, waits, inbox)

    # --- what it says ---

    def _note_gauges(self) -> None:
        self.metrics.set("kitaru_worker_running", self.children.at_work)
        self.metrics.set("kitaru_worker_waiting", len(self._ready))
        self.metrics.set("kitaru_worker_hints", sum(len(agenda) for agenda in self._agendas.values()))
        self.metrics.set("kitaru_worker_warm", self.children.is_warm)
        self.metrics.set("kitaru_worker_draining", self._stopping is not None)
        for limit, size in self.settings.limits.items():
            self.metrics.set("kitaru_worker_limit_size", size, limit=limit)
            self.metrics.set("kitaru_worker_limit_used", self.children.count(limit), limit=limit)

    def _forget_old(self) -> None:
        if len(self._seen) > 1000:
            old = time.monotonic() - REMEMBERED
            self._seen = {run_id: seen for run_id, seen in self._seen.items() if seen.at > old}

    def _say(self, text: str, **facts: Any) -> None:
        logger.info("%s", text, extra=facts)

    def _debug(self, run_id: str, text: str) -> None:
        logger.debug("run %s %s", run_id, text, extra={"run": run_id})

    def _problem(self, text: str, run_id: str | None = None) -> None:
        self.metrics.add("kitaru_worker_problems_total")
        logger.warning("%s", text if run_id is None else f"run {run_id} {text}", extra={"run": run_id, "event": "problem"})


def _said(problem: BaseException) -> str:
    return str(problem) if isinstance(problem, KitaruError) else f"{type(problem).__name__}: {problem}"
