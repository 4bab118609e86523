"""The entry point: `generate(onlinespec=...)` and what is attached to a model are recognised and handed to our loop."""

from .answers import Answer
from .attachment import attach, attached, detach, online_metrics
from .hooks import disable, enable
from .stream import generate_stream

__all__ = ["Answer", "attach", "attached", "detach", "disable", "enable", "generate_stream", "online_metrics"]
