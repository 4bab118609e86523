"""Every error that hf_onlinespec raises on purpose: one root, each child also a standard error."""


class OnlineSpecError(Exception):
    """The root: catch this to catch them all."""


class ConfigError(OnlineSpecError, ValueError):
    """A setting has a value that cannot work, or that is not available yet."""


class DraftError(OnlineSpecError, ValueError):
    """This draft cannot serve this target."""


class UnsupportedError(OnlineSpecError, ValueError):
    """This call of `generate` asks for something the decoding loop does not take."""


class CopyError(OnlineSpecError, TypeError):
    """A live draft cannot be copied or pickled."""


class NotAModelError(OnlineSpecError, AttributeError):
    """A draft was used as one of transformers' own models."""


class ArtifactError(OnlineSpecError, ValueError):
    """A saved draft is damaged, incomplete, of another format, or belongs to another base."""


class HubError(OnlineSpecError, ConnectionError):
    """The Hub could not be reached, or refused; the live draft is as it was."""


class PrivacyError(OnlineSpecError, PermissionError):
    """A public push would show what the draft learned from private text."""


class MissingExtraError(OnlineSpecError, ImportError):
    """An optional package that a command needs is not installed."""


class VersionError(OnlineSpecError, ImportError):
    """The installed transformers or peft has moved something that hf_onlinespec relies on."""
