"""Ends the process with a one-line error if an environment variable would break the import of DeepSpeed.

Import this module before all others, because DeepSpeed reads environment variables when it is imported.
"""

import os
import sys

from beit3_ds.config import ConfigError
from beit3_ds.runtime.environment import check_variables

try:
    check_variables(os.environ)
except ConfigError as error:
    print(f"error on rank {os.environ.get('RANK', '?')}: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2) from None
