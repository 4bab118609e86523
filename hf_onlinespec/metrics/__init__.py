"""The numbers, each defined once.

acceptance_length   tokens emitted per target forward (accepted + 1, less where a request ends), averaged over rounds; in a batch a
                    round of each row counts
acceptance_rate     mean Σ min(p, q) over verified positions, p and q as in the accept test (greedy: argmax agreement)
tokens_per_s        new tokens over wall time, learning included
decode_tokens_per_s the same with the learning time left out: always shown beside the other
update_share        learning time over wall time
"""

from .counts import CandidateCounts, Counts
from .decisions import Decisions
from .draft_metrics import HISTORY_BUCKETS, DraftMetrics
from .reports import RequestReport, Trace, UpdateReport

__all__ = [
    "HISTORY_BUCKETS",
    "CandidateCounts",
    "Counts",
    "Decisions",
    "DraftMetrics",
    "RequestReport",
    "Trace",
    "UpdateReport",
]
