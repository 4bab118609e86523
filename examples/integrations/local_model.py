"""What the scripts of this folder load: a folder with a small chat model that needs no network, or the one named by --model."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from hf_onlinespec.embedded import load_pair

# The embedded target was not trained on chats: what the user says is its prompt.
TEMPLATE = "<|endoftext|>{% for message in messages %}{{ message['content'] }}{% endfor %}"
PROMPTS = ("# git log\n\n> Show a history of commits.\n\n-", "# tar\n\n> Archiving utility.\n\n-")


def folder(doc: str | None) -> Path:
    """The folder of the model that the command line asks for; by default a copy of the embedded target with a chat template."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a chat model; default: the embedded target")
    chosen: Path | None = parser.parse_args().model
    if chosen is not None:
        return chosen
    copied = Path(tempfile.mkdtemp(prefix="onlinespec_"))
    pair = load_pair()
    pair.target.save_pretrained(copied)
    pair.tokenizer.chat_template = TEMPLATE
    pair.tokenizer.save_pretrained(copied)
    AutoTokenizer.from_pretrained(copied)  # what was saved can be read
    return copied
