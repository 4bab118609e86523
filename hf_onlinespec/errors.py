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


LONGEST = 300  # characters of a value in a message


def brief(value: object) -> str:
    """A value as it stands in a message: whole where it is short."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more digits than Python writes; nested too deep
        return f"a {type(value).__name__} that is too large to be written"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text):,} characters)"


def require_whole(name: str, value: object, least: int = 1, most: int | None = None, otherwise: str = "") -> int:
    """The value, if it is a whole number in these bounds; a bool is none.

    Args:
        otherwise: what else is allowed, for the error: ", or 'auto'".

    Raises:
        ConfigError: it is not.
    """
    if isinstance(value, int) and not isinstance(value, bool) and least <= value and (most is None or value <= most):
        return value
    bound = "" if most is None else f" and at most {most:,}"
    raise ConfigError(f"{name}={brief(value)}: expected a whole number, at least {least}{bound}{otherwise}.")
