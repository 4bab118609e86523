"""The entry point: `generate(onlinespec=...)` and what is attached to a model are recognised and handed to our loop."""

from .attachment import attach, attached, detach, online_metrics
from .hooks import disable, enable

__all__ = ["attach", "attached", "detach", "disable", "enable", "online_metrics"]
