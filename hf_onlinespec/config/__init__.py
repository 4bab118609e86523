"""OnlineSpecConfig: every setting of drafting and learning, validated when it is made."""

from .allowed import ENSEMBLE, MOST, MOST_RANK, REPORTING, ReportTo
from .settings import OnlineSpecConfig, as_config, one_expert

__all__ = ["ENSEMBLE", "MOST", "MOST_RANK", "REPORTING", "OnlineSpecConfig", "ReportTo", "as_config", "one_expert"]
