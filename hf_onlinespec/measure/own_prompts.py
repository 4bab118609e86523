"""Prompts from a user's own file, and whether they fit the target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PretrainedConfig

from .._compat.models import max_positions, max_source_positions
from ..errors import ConfigError
from ..training.corpus import check_text, parse_text, read_lines
from .records import Prompt


def load_prompts(path: Path, limit: int | None, new_tokens: int) -> list[Prompt]:
    """Reads lines of JSON, {"prompt": "..."}, with a "domain" where you like, or of a .txt file; empty lines are left out.

    Raises:
        ConfigError: the file cannot be read, a line is malformed, or there is no prompt.
    """
    lines = read_lines(path, f"--prompts {path}")
    numbered = [(at, line) for at, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".txt":
        found = [(line, "") for _, line in numbered]
    else:
        found = [_text(line, f"--prompts {path}, line {at}") for at, line in numbered]
    if not found:
        form = "" if path.suffix == ".txt" else ' {"prompt": "..."}'
        raise ConfigError(f"--prompts {path}: the file has no prompts. Write one{form} per line.")
    return [Prompt(text, domain or path.stem, new_tokens) for text, domain in found[:limit]]


def _text(line: str, where: str) -> tuple[str, str]:
    """A prompt and its domain, "" if none is given."""
    wanted = 'expected a JSON object with a text, such as {"prompt": "..."}'
    key, item = parse_text(line, where, ("prompt",), wanted)
    domain = str(item.get("domain", ""))
    check_text(domain, where)
    # It stands in tables: in one line, and without what a terminal would take for a command.
    return str(item[key]), "".join(c for c in " ".join(domain.split()) if c.isprintable())


def longest_prompt(target: PretrainedConfig, new_tokens: int) -> int:
    """Most tokens of a prompt beside so many new ones; below 1: none fits. An encoder reads it apart from them."""
    room = max_positions(target) - new_tokens
    return max_source_positions(target) if target.is_encoder_decoder and room > 0 else room


def fits(length: int, target: PretrainedConfig, new_tokens: int) -> bool:
    """Whether the target takes a prompt of so many tokens, and the new ones."""
    return 0 < length <= longest_prompt(target, new_tokens)


def check_lengths(prompts: Sequence[Prompt], lengths: Sequence[int], target: PretrainedConfig) -> None:
    """Raises ConfigError where a prompt is empty for the tokenizer, or leaves no room for the new tokens.

    Args:
        lengths: of the prompts, in tokens.
    """
    for at, (prompt, length) in enumerate(zip(prompts, lengths, strict=True), 1):
        if not fits(length, target, prompt.new_tokens):
            longest = longest_prompt(target, prompt.new_tokens)
            if longest < 1:
                raise ConfigError(
                    f"The target takes {max_positions(target)} tokens: no prompt fits beside {prompt.new_tokens} new ones. Use --new-tokens."
                )
            raise ConfigError(
                f"Prompt {at} has {length} tokens: the target takes from 1 to {longest}, and {prompt.new_tokens} new ones."
            )
