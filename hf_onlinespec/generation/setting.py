"""`GenerationConfig.onlinespec` and `GenerationConfig.adapter`, the settings that `enable()` adds."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from .._compat.generation import keeps_extras
from ..commit.base import Draft
from ..config import OnlineSpecConfig
from ..config.adapters import Asked, checked_adapter
from ..errors import ConfigError


class _Settings(dict[str, Any]):
    """A config as plain JSON values, because transformers copies and prints its configurations; and as it was given.

    Where it reports is in the latter alone: it is not saved, and an object is not copied.
    """

    def __init__(self, config: OnlineSpecConfig) -> None:
        super().__init__(config.to_saved())
        self.config = config

    def __deepcopy__(self, memo: dict[int, Any]) -> _Settings:
        return _Settings(self.config)

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:  # pickled as the values alone
        return dict, (dict(self),)


class OnlineSpecSetting:
    """Its being an attribute of the class lets `generate` accept the argument."""

    def __get__(self, config: GenerationConfig | None, owner: type) -> OnlineSpecConfig | bool | None:
        value = None if config is None else config.__dict__.get("onlinespec")
        if isinstance(value, _Settings):
            return value.config
        return OnlineSpecConfig.from_saved(value) if isinstance(value, dict) else value

    def __set__(self, config: GenerationConfig, value: OnlineSpecConfig | dict[str, Any] | bool | None) -> None:
        if isinstance(value, _Settings):
            value = value.config
        if isinstance(value, dict):
            value = OnlineSpecConfig.from_saved(value)
        if value is not None:
            keeps_extras(config)
        if isinstance(value, OnlineSpecConfig):
            config.__dict__["onlinespec"] = _Settings(value)
        elif value is None or isinstance(value, bool):
            config.__dict__["onlinespec"] = value
        else:
            raise ConfigError(f"onlinespec={value!r}: expected True, False or an OnlineSpecConfig.")


class AdapterSetting:
    """The names of adapters, for all rows or per row; checked when they are set, and plain JSON values."""

    def __get__(self, config: GenerationConfig | None, owner: type) -> Asked:
        return None if config is None else config.__dict__.get("adapter")

    def __set__(self, config: GenerationConfig, value: Asked) -> None:
        if value is not None:
            keeps_extras(config)
        config.__dict__["adapter"] = checked_adapter(value)


def add_settings() -> None:
    """Gives transformers' configurations the attributes, which their annotations know nothing of."""
    GenerationConfig.onlinespec = OnlineSpecSetting()  # type: ignore[attr-defined]
    GenerationConfig.adapter = AdapterSetting()  # type: ignore[attr-defined]


def remove_settings() -> None:
    del GenerationConfig.onlinespec  # type: ignore[attr-defined]
    del GenerationConfig.adapter  # type: ignore[attr-defined]


def unset(config: GenerationConfig) -> None:
    """Lets a configuration say nothing."""
    config.onlinespec = None  # type: ignore[attr-defined]


def wanted(config: GenerationConfig) -> OnlineSpecConfig | bool | None:
    """What a configuration says; None: nothing."""
    return config.onlinespec  # type: ignore[attr-defined]


def is_ours(config: GenerationConfig, assistant: object) -> bool:
    """Whether a call decodes in our loop: with a draft of ours always (with onlinespec=False it only drafts), with any other when asked to."""
    return isinstance(assistant, Draft) or bool(wanted(config))


def wanted_adapter(config: GenerationConfig) -> Asked:
    """The adapters that a configuration asks for; None: nothing."""
    return config.adapter  # type: ignore[attr-defined]


def says(argument: object, config: GenerationConfig | None, saved: GenerationConfig) -> bool:
    """Whether a call itself says something about drafting: in an argument, or in a configuration that is no copy of the model's."""
    if argument is not None:
        return True
    return config is not None and wanted(config) not in (None, wanted(saved))


def first_said(argument: Any, *configs: GenerationConfig | None) -> OnlineSpecConfig | bool | None:
    """What a call says about drafting, before transformers has merged its configurations: the first that says anything goes."""
    values = [argument, *(wanted(config) for config in configs if config is not None)]
    return next((value for value in values if value is not None), None)
