"""Clock, randomness and ids that replay as they were: each call is a small durable step."""

from __future__ import annotations

import datetime as dt
import random as _random
import uuid

from kitaru_zenml.checkpoints import checkpoint


@checkpoint
def now() -> dt.datetime:
    """The time in UTC, recorded: a replay gets the time of the first run."""
    return dt.datetime.now(dt.UTC)


@checkpoint
def random() -> float:
    """A random number from [0, 1), recorded."""
    return _random.random()


@checkpoint
def uuid4() -> uuid.UUID:
    """A random UUID, recorded."""
    return uuid.uuid4()
