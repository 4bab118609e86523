"""The terminal of `hf-onlinespec chat`: lines in, coloured text out, commands, Ctrl-C.

Answers go to stdout, all else to stderr, so that in a pipe the answers stand alone. Escape codes go to terminals that take them.
"""

from __future__ import annotations

import os
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text

from ..draft import OnlineDraft
from ..errors import ConfigError
from ..generation import attach
from ..share.folder import is_artifact
from ..training.corpus import check_text
from .chat import Chat
from .common import AUTO, INTERRUPTED, check_folder, check_own, check_saving, explain, quiet_libraries
from .loading import best_device, check_template, load_config, load_pair, load_tokenizer

PROMPT = "› "
DRAFTED, QUIET = "green", "dim"  # styles
HELP = (
    "/reset          forget the conversation (what was learned stays)",
    "/plain          plain generation, and back",
    "/colours        the colour of drafted text, off and on",
    "/stats          all numbers since the start",
    "/save FOLDER    save the evolved draft",
    "/quit           leave (also Ctrl-D; Ctrl-C stops an answer, and leaves at the prompt)",
)


@dataclass(frozen=True)
class ChatSettings:
    """The options of `chat`."""

    target: str
    draft: str | None = None
    system: str | None = None
    new_tokens: int = 512
    temperature: float | None = None  # None: as the model's generation_config says
    colours: bool = True
    save: Path | None = None
    dtype: str = AUTO
    device: str | None = None

    def __post_init__(self) -> None:
        if self.new_tokens < 1:
            raise ConfigError(f"--new-tokens {self.new_tokens}: expected at least 1.")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"--temperature {self.temperature}: expected at least 0.")
        check_text(self.system or "", "--system")

    def options(self) -> dict[str, object]:
        """What `--temperature` means to `generate`."""
        if self.temperature is None:
            return {}
        return {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}


def run_chat(settings: ChatSettings) -> int:
    """Loads the models and chats until the user leaves; the exit code."""
    check_saving(settings.save, settings.draft)
    quiet_libraries(bars=True)
    device = best_device(settings.device)
    config, tokenizer = load_config("TARGET", settings.target), load_tokenizer("TARGET", settings.target)
    check_template("TARGET", settings.target, tokenizer)
    notes = console(sys.stderr)
    notes.print(f"Loading {settings.target} …", style=QUIET, markup=False)
    target, draft = load_pair(settings.target, settings.draft, config, tokenizer, settings.dtype, device)
    drafts = attach(target, draft)
    chat = Chat(target, tokenizer, drafts, settings.system, settings.new_tokens, settings.options())
    dtype = str(target.dtype).removeprefix("torch.")
    who = "its suffix memory" if settings.draft is None else settings.draft
    notes.print(f"{settings.target}, {dtype} on {device}; {who} drafts. /help lists the commands.", markup=False)
    if tokenizer.chat_template is None:
        notes.print("This model has no chat template: it goes on with your text as it is.", markup=False)
    out = console(sys.stdout)
    if settings.colours and out.color_system is not None:
        out.print(Text("Drafted and accepted text has this colour", DRAFTED), "; the rest is the target's own.", sep="")
    named = None if settings.draft is None else Path(settings.draft)
    return Terminal(chat, out, notes, reader(), settings.colours, settings.save, named).run()


def console(file: TextIO) -> Console:
    """A console that writes escape codes only to a terminal that takes them, and where NO_COLOR does not forbid it."""
    found = Console(file=file, highlight=False, soft_wrap=True)
    if found.no_color or found.is_dumb_terminal or not found.is_terminal:
        found = Console(file=file, highlight=False, soft_wrap=True, color_system=None, force_terminal=False)
    return found


def reader() -> Callable[[], str]:
    """Reads a line from the user: with prompt_toolkit where it is installed, with `input` elsewhere; raises EOFError at the end."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return input  # from a pipe or a file
    if os.environ.get("TERM", "") not in ("", "dumb"):
        try:
            from prompt_toolkit import PromptSession
        except ImportError:
            pass
        else:
            session: PromptSession[str] = PromptSession()
            return lambda: session.prompt(PROMPT)
    return lambda: input(PROMPT)


@contextmanager
def ctrl_c() -> Iterator[Callable[[], bool]]:
    """For its time the first Ctrl-C sets what it yields, and the second raises KeyboardInterrupt."""
    pressed = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def safe(text: str) -> str:
    """Text of a model, without what a terminal would take for a command."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


class Terminal:
    """Reads messages and commands, and shows answers.

    Args:
        out: for answers.
        notes: for all else.
        read: gives the next line; raises EOFError at the end.
        save: where the draft is saved on leaving.
        draft: what `--draft` names: where that is a saved draft, it may be saved there again.
    """

    def __init__(
        self,
        chat: Chat,
        out: Console,
        notes: Console,
        read: Callable[[], str],
        colours: bool = True,
        save: Path | None = None,
        draft: Path | None = None,
    ) -> None:
        self._own = [folder for folder in (save, draft) if folder is not None]  # where a state of this draft may lie
        self._chat, self._out, self._notes, self._read = chat, out, notes, read
        self._colours, self._save = colours, save

    def run(self) -> int:
        """Until the user leaves; the exit code."""
        code = 0
        try:
            while self._turn():
                pass
        except EOFError:
            self._notes.print()
        except KeyboardInterrupt:
            self._notes.print()
            code = INTERRUPTED
        finally:
            if self._save is not None:
                self._notes.print(self._chat.save(self._save), markup=False)
        return code

    def _turn(self) -> bool:
        line = (
            self._read().encode("utf-8", "replace").decode()
        )  # bytes of a pipe that are no text come as halves of characters
        if line.startswith("/"):
            return self._command(*line[1:].split(maxsplit=1))
        if line.strip():
            self._answer(line.strip())
        return True

    def _answer(self, text: str) -> None:
        try:
            with ctrl_c() as stopped:
                answer = self._chat.answer(text, self.show, stopped)
                self._out.print()
                self._chat.measure_plain(stopped)  # a Ctrl-C that comes a little late leaves nothing
        except (Exception, KeyboardInterrupt) as error:
            self._out.print()
            line = explain(error) if isinstance(error, Exception) else None
            if line is None:
                raise
            self._notes.print(line, markup=False)
            return
        self._notes.print(f"[{self._chat.status(answer)}]", style=QUIET, markup=False)

    def show(self, text: str, drafted: bool) -> None:
        """Writes a piece of an answer, without what a terminal would obey."""
        style = Style.parse(DRAFTED) if drafted and self._colours else None
        self._out.print(Segments([Segment(safe(text), style)]), end="")  # a Text would write spaces for tabs

    def _check_saving(self, folder: Path) -> None:
        """Raises ConfigError where a draft cannot be saved, or would be written over something else than its own earlier state."""
        if not isinstance(self._chat.drafts, OnlineDraft):
            return  # there is none
        check_folder(folder, f"/save {folder}")
        check_own(folder, f"/save {folder}")
        own = {path.resolve() for path in self._own}
        if is_artifact(folder) and folder.resolve() not in own:
            raise ConfigError(f"/save {folder}: another draft was saved there. Name a new folder.")
        self._own.append(folder)

    def _command(self, name: str = "", argument: str = "") -> bool:
        """Does what a command says; whether the chat goes on."""
        say = []
        if name in ("quit", "exit"):
            return False
        if name == "reset":
            self._chat.reset()
            say.append("The conversation is forgotten; what was learned stays.")
        elif name == "plain":
            self._chat.plain = not self._chat.plain
            say.append("Plain generation: nothing drafts." if self._chat.plain else "Drafting goes on.")
        elif name in ("colours", "colors"):
            self._colours = not self._colours
            say.append(f"The colour of drafted text is {'on' if self._colours else 'off'}.")
        elif name == "stats":
            say += self._chat.stats()
        elif name == "save" and (argument or self._save is not None):
            folder = Path(argument).expanduser() if argument or self._save is None else self._save
            try:
                self._check_saving(folder)
                say.append(self._chat.save(folder))
            except Exception as error:
                line = explain(error)
                if line is None:
                    raise
                say.append(line)
        elif name == "help":
            say += HELP
        else:
            say += [f"/{name}: no such command, or an argument is missing.", *HELP]
        self._notes.print("\n".join(say), markup=False)
        return True
