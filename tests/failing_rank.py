"""Trains one rank that fails when it appends the record of its first step.

Usage: python -m tests.failing_rank CONFIG
"""

import sys
from typing import Any

from beit3_ds.train import main
from beit3_ds.training.metrics_log import MetricsLog


def _fail(log: MetricsLog, record: dict[str, Any]) -> None:
    raise LookupError(f"a planted fault at step {record['step']}")


if __name__ == "__main__":
    MetricsLog.append = _fail  # type: ignore[method-assign]
    sys.exit(main())
