"""A local orchestrator that runs isolated steps in processes of their own: a small stand-in for one that starts pods."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any, ClassVar

from zenml.enums import ExecutionStatus
from zenml.models import StepRunResponse
from zenml.orchestrators.local.local_orchestrator import LocalOrchestrator, LocalOrchestratorFlavor
from zenml.orchestrators.utils import get_step_entrypoint_command
from zenml.step_operators.step_operator_entrypoint_configuration import StepOperatorEntrypointConfiguration


class IsolatingOrchestrator(LocalOrchestrator):
    processes: ClassVar[dict[str, subprocess.Popen[bytes]]] = {}

    def submit_isolated_step(self, step_run_info: Any, environment: dict[str, str]) -> None:
        command, arguments = get_step_entrypoint_command(
            invocation_id=step_run_info.pipeline_step_name,
            config=step_run_info.config,
            entrypoint_config_class=StepOperatorEntrypointConfiguration,
            snapshot_id=step_run_info.snapshot.id,
            step_run_id=str(step_run_info.step_run_id),
        )
        log = open(os.environ["ISOLATED_LOG"], "ab")
        process = subprocess.Popen(
            [sys.executable, *command[1:], *arguments], env={**os.environ, **environment}, stdout=log, stderr=log
        )
        self.processes[str(step_run_info.step_run_id)] = process

    def get_isolated_step_status(self, step_run: StepRunResponse) -> ExecutionStatus:
        code = self.processes[str(step_run.id)].poll()
        if code is None:
            return ExecutionStatus.RUNNING
        return ExecutionStatus.COMPLETED if code == 0 else ExecutionStatus.FAILED


class IsolatingOrchestratorFlavor(LocalOrchestratorFlavor):
    @property
    def name(self) -> str:
        return "isolating"

    @property
    def implementation_class(self) -> type[LocalOrchestrator]:
        return IsolatingOrchestrator
