"""stub"""
from __future__ import annotations
from collections.abc import Callable
from typing import Any
from kitaru_zenml.journal.records import StepRecord

class NotAtHand:
    """A value that is too large to show: its size in bytes is."""
    def __init__(self, size: int) -> None:
        self.size = size

def step_view(record: StepRecord, output: Any, name_of: Callable[[str], str | None]) -> str:
    """stub"""
    return "<html></html>"
