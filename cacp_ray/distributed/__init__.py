"""The Ray side of scoring: joining a cluster, and a pool of evaluator actors.

Ray prints the messages of its node daemons in the driver's terminal even with
`log_to_driver=False`. The pool reports losses itself, so they are skipped. Ray reads this setting
when it is imported.
"""

import os

os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
