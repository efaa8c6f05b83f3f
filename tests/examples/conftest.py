"""A ZenML of the tests' own, for examples that run in this process."""

from __future__ import annotations

import os
import tempfile

if "ZENML_CONFIG_PATH" not in os.environ:  # before the first import of ZenML
    os.environ["ZENML_CONFIG_PATH"] = tempfile.mkdtemp(prefix="kitaru-examples-")
os.environ.setdefault("ZENML_ANALYTICS_OPT_IN", "false")
os.environ.setdefault("ZENML_LOGGING_VERBOSITY", "WARN")
