"""hf_onlinespec: a `generate()` that gets faster the more it is used; in float32 its text is that of plain `generate`.

Importing it teaches `generate` one argument:

    out = target.generate(**inputs, assistant_model=draft, onlinespec=True)
"""

from .adapt.feedback import Feedback, FeedbackRecorder
from .commit.assisted import OnlineCandidateGenerator
from .commit.memory_draft import MemoryDraft, online_memory
from .config import OnlineSpecConfig
from .draft import OnlineDraft, online_draft
from .errors import (
    ArtifactError,
    ConfigError,
    CopyError,
    DraftError,
    HubError,
    MissingExtraError,
    NotAModelError,
    OnlineSpecError,
    PrivacyError,
    UnsupportedError,
    VersionError,
)
from .generation import Answer, attach, attached, detach, disable, enable, generate_stream, online_metrics
from .metrics import DraftMetrics, RequestReport, Trace, UpdateReport
from .runtime.version import __version__ as __version__

__all__ = [
    "Answer",
    "ArtifactError",
    "ConfigError",
    "CopyError",
    "DraftError",
    "DraftMetrics",
    "Feedback",
    "FeedbackRecorder",
    "HubError",
    "MemoryDraft",
    "MissingExtraError",
    "NotAModelError",
    "OnlineCandidateGenerator",
    "OnlineDraft",
    "OnlineSpecConfig",
    "OnlineSpecError",
    "PrivacyError",
    "RequestReport",
    "Trace",
    "UnsupportedError",
    "UpdateReport",
    "VersionError",
    "attach",
    "attached",
    "detach",
    "disable",
    "enable",
    "generate_stream",
    "online_draft",
    "online_memory",
    "online_metrics",
]

enable()
