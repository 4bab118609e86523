"""The chat: what it says is what the target says to the whole conversation, however much of it is in the cache."""

from __future__ import annotations

import copy
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from hf_onlinespec import OnlineDraft, OnlineSpecConfig, attach, detach
from hf_onlinespec._compat.caches import held_tokens
from hf_onlinespec.cli.chat import Chat
from hf_onlinespec.cli.streaming import UNFINISHED, Detokenizer
from hf_onlinespec.cli.terminal import PROMPT, Terminal, console, ctrl_c, reader
from hf_onlinespec.embedded import FOLDER, EmbeddedPair, load_draft, prompts
from hf_onlinespec.errors import ConfigError
from hf_onlinespec.share.manifest import Manifest
from hf_onlinespec_cli import main
from tests.conftest import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|endoftext|>' + m['content'] }}{% else %}{{ m['content'] }}"
    "{% endif %}{% endfor %}"
)
TRIMMED = TEMPLATE.replace(
    "{{ m['content'] }}", "{{ m['content'] | trim | upper }}"
)  # earlier turns as they were not said
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + TEMPLATE
GREEDY = {"do_sample": False}
NEW_TOKENS = 12


def quiet(text: str, drafted: bool) -> None:
    pass


@pytest.fixture
def tokenizer(pair: EmbeddedPair) -> PreTrainedTokenizerBase:
    found = copy.deepcopy(pair.tokenizer)
    found.chat_template = TEMPLATE
    return found


@pytest.fixture
def target(pair: EmbeddedPair) -> Iterator[PreTrainedModel]:
    yield pair.target
    detach(pair.target)


@pytest.fixture
def chat(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Chat:
    return Chat(target, tokenizer, attach(target, OnlineDraft(load_draft())), None, NEW_TOKENS, GREEDY)


def afresh(chat: Chat, texts: list[str]) -> list[str]:
    """The answers of plain generation that reads every conversation from its beginning."""
    messages, answers = [], []
    for text in texts:
        messages.append({"role": "user", "content": text})
        ids = chat.tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
        out = chat.target.generate(ids, max_new_tokens=NEW_TOKENS, onlinespec=False, **GREEDY)
        answers.append(chat.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def questions(n: int = 2) -> list[str]:
    return [text.removeprefix("<|endoftext|>") for text in prompts("shell")[:n]]


def test_turns_reuse_the_cache_and_say_what_plain_generation_says(chat: Chat) -> None:
    texts = questions()
    answers = [chat.answer(text, quiet) for text in texts]
    assert [answer.text for answer in answers] == afresh(chat, texts)
    assert answers[0].reused_tokens == 0
    # All but the newest tokens: the last one of an answer is never read before it is part of a prompt.
    first = len(chat.tokenizer(f"<|endoftext|>{texts[0]}").input_ids)
    assert answers[1].reused_tokens == first + answers[0].new_tokens - 1
    assert all(answer.counts is not None and answer.counts.rounds < answer.new_tokens for answer in answers[:1])


def test_a_template_that_writes_earlier_turns_in_another_way_is_followed(chat: Chat) -> None:
    chat.tokenizer.chat_template = TRIMMED
    texts = questions()
    answers = [chat.answer(text, quiet) for text in texts]
    assert [answer.text for answer in answers] == afresh(chat, texts)
    shared = len(chat.tokenizer(f"<|endoftext|>{texts[0]}").input_ids)
    assert shared - 1 <= answers[1].reused_tokens < shared + answers[0].new_tokens - 1


def test_a_cache_that_cannot_be_rolled_back_is_read_anew(tokenizer: PreTrainedTokenizerBase) -> None:
    """A window has dropped what was before the tokens that would have to go."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=2048, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    target = MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=2, sliding_window=4)).eval()
    tokenizer.chat_template = TRIMMED
    chat = Chat(target, tokenizer, attach(target), None, NEW_TOKENS, GREEDY)
    texts = questions()
    answers = [chat.answer(text, quiet) for text in texts]
    assert [answer.text for answer in answers] == afresh(chat, texts)
    assert [answer.reused_tokens for answer in answers] == [0, 0]


def test_a_cache_of_another_kind_is_made_anew(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat.target.generation_config, "cache_implementation", "static")
    first = chat.answer(questions()[0], quiet)
    answers = [first, chat.answer(questions()[1], quiet)]
    chat.measure_plain()
    assert [answer.text for answer in answers] == afresh(chat, questions())
    assert [answer.reused_tokens for answer in answers] == [0, 0] and first.counts is not None


def test_without_a_template_the_text_goes_on(chat: Chat) -> None:
    chat.tokenizer.chat_template = None
    chat.reset()
    first = chat.answer("<|endoftext|>" + questions()[0], quiet)
    second = chat.answer("\nls -l", quiet)
    whole = chat.tokenizer("<|endoftext|>" + questions()[0]).input_ids
    assert second.reused_tokens == len(whole) + first.new_tokens - 1


def test_pieces_are_the_answer_and_tell_what_was_drafted(chat: Chat) -> None:
    pieces: list[tuple[str, bool]] = []
    answer = chat.answer(questions()[0], lambda *piece: pieces.append(piece))
    assert "".join(text for text, _ in pieces) == answer.text
    assert answer.counts is not None
    assert 0 < sum(drafted for _, drafted in pieces) <= answer.counts.accepted_tokens
    assert any(not drafted for _, drafted in pieces)
    pieces.clear()
    chat.plain = True
    plain = chat.answer(questions()[1], lambda *piece: pieces.append(piece))
    assert plain.counts is None and pieces and not any(drafted for _, drafted in pieces)
    assert "plain generation" in chat.status(plain)


def test_an_answer_that_is_stopped_stays_and_the_next_turn_goes_on_from_it(chat: Chat) -> None:
    texts, pieces = questions(), []
    stopped = chat.answer(texts[0], lambda text, _: pieces.append(text), lambda: len(pieces) > 3)
    assert stopped.interrupted and 3 < stopped.new_tokens < NEW_TOKENS and "stopped" in chat.status(stopped)
    assert stopped.text == "".join(pieces) and afresh(chat, texts[:1])[0].startswith(stopped.text)
    second = chat.answer(texts[1], quiet)
    begun = f"<|endoftext|>{texts[0]}{stopped.text}<|endoftext|>{texts[1]}"
    ids = chat.tokenizer(begun, return_tensors="pt").input_ids
    out = chat.target.generate(ids, max_new_tokens=NEW_TOKENS, onlinespec=False, **GREEDY)
    assert second.text == chat.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert second.reused_tokens > 0


def test_an_error_in_the_middle_leaves_the_conversation_as_it_was(chat: Chat) -> None:
    texts = questions()

    def fails(text: str, drafted: bool) -> None:
        raise KeyboardInterrupt

    first = chat.answer(texts[0], quiet)
    with pytest.raises(KeyboardInterrupt):
        chat.answer(texts[1], fails)
    assert [first.text, chat.answer(texts[1], quiet).text] == afresh(chat, texts[:2])


def test_measuring_plain_generation_changes_nothing_and_costs_little(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = questions()
    first = chat.answer(texts[0], quiet)
    chat.measure_plain()
    speed = chat.plain_speed
    assert speed.tokens_per_s and speed.measurements == 1
    assert f"(plain {speed.tokens_per_s:.1f})" in chat.status(first)
    second = chat.answer(texts[1], quiet)
    assert [first.text, second.text] == afresh(chat, texts[:2])
    assert second.reused_tokens > first.new_tokens
    speed.time_s = chat.answering_s  # much more than its share
    chat.measure_plain()
    assert speed.measurements == 1
    speed.time_s = 0.0
    chat.measure_plain(lambda: True)
    assert speed.measurements == 1 and speed.time_s > 0
    speed.time_s = 0.0
    chat.measure_plain()
    assert speed.measurements == 2 and len(chat.kept.tokens) == held_tokens(chat.kept.cache)
    assert any(f"measuring that took {speed.time_s:.1f} s" in line for line in chat.stats())


def test_too_long_a_conversation_is_refused_and_reset_helps(chat: Chat) -> None:
    with pytest.raises(ConfigError, match="begin anew with /reset"):
        chat.answer("ls " * 600, quiet)
    assert chat.answer(questions()[0], quiet).text == afresh(chat, questions(1))[0]
    chat.reset()
    assert chat.answer(questions()[0], quiet).reused_tokens == 0


def test_the_last_answer_ends_where_the_model_does(chat: Chat) -> None:
    most = chat.target.config.max_position_embeddings
    long = "ls -l " * 400
    ids = chat.tokenizer(f"<|endoftext|>{long}").input_ids
    while len(ids) > most - 3:
        long = long[:-6]
        ids = chat.tokenizer(f"<|endoftext|>{long}").input_ids
    assert chat.answer(long, quiet).new_tokens <= most - len(ids)


def test_a_system_message(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    drafts = attach(target)
    chat = Chat(target, tokenizer, drafts, "Be brief.", 4, GREEDY)
    chat.answer(questions()[0], quiet)
    chat.reset()
    chat.answer(questions()[0], quiet)
    assert chat.conversation.messages[0] == {"role": "system", "content": "Be brief."}
    tokenizer.chat_template = NO_SYSTEM
    with pytest.raises(ConfigError, match=r"--system: .*Perhaps it takes no system message"):
        Chat(target, tokenizer, drafts, "Be brief.")
    tokenizer.chat_template = '{{ raise_exception("never") }}'
    with pytest.raises(
        ConfigError, match=r"^The chat template of this model does not take this conversation \(never\)"
    ):
        Chat(target, tokenizer, drafts)
    tokenizer.chat_template = None
    chat = Chat(target, tokenizer, drafts, "# shell\n", 4, GREEDY)
    first = chat.answer("ls", quiet)
    assert (
        first.new_tokens > 0
        and chat.conversation.sequence.shape[1] == len(tokenizer("# shell\nls").input_ids) + first.new_tokens
    )


def test_characters_of_several_tokens_come_whole(pair: EmbeddedPair) -> None:
    text = "é € ➜ 😀 x\n"
    tokens = pair.tokenizer(text).input_ids
    detokenizer = Detokenizer(pair.tokenizer)
    pieces = [detokenizer.add(token) for token in tokens]
    assert len(tokens) > len(text) and "".join(pieces) == text and UNFINISHED not in "".join(pieces)
    cut = Detokenizer(pair.tokenizer)
    assert "".join(cut.add(token) for token in tokens[:1]) + cut.end() != ""


# The terminal


def lines(*texts: str) -> Callable[[], str]:
    """Reads these lines, and then the end."""
    left = iter(texts)

    def read() -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return read


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bytes_that_are_no_text_are_read_as_question_marks(chat: Chat) -> None:
    heard = []
    for line in ("ls \udcff", "ls ?"):
        out = io.StringIO()
        terminal = Terminal(chat, Console(file=out), Console(file=io.StringIO()), lines("/reset", line, "/quit"))
        assert terminal.run() == 0
        heard.append(out.getvalue())
    assert heard[0] == heard[1] and len(heard[0].strip()) > 4


def test_commands(chat: Chat, tmp_path: Path) -> None:
    out, notes = io.StringIO(), io.StringIO()
    text = questions()[0]
    commands = [
        "/help",
        text,
        "",
        "/stats",
        "/plain",
        text,
        "/plain",
        "/colours",
        "/reset",
        "/save",
        f"/save {tmp_path / 'x'}",
    ]
    terminal = Terminal(
        chat, Console(file=out), Console(file=notes, width=200), lines(*commands, "/nonsense", "/quit", text)
    )
    assert terminal.run() == 0
    said = notes.getvalue()
    for words in (
        "forget the conversation",
        "tokens per target forward",
        "answers: 1, in",
        "Plain generation: nothing drafts.",
        "(plain generation)",
        "Drafting goes on.",
        "drafted text is off",
        "The conversation is forgotten",
        "/save: no such command, or an argument is missing",
        f"Saved: {tmp_path / 'x'}",
        "/nonsense: no such command",
    ):
        assert words in said, words
    assert chat.answers == 2
    assert Manifest.read(tmp_path / "x").serving.requests == 1
    assert "\x1b" not in out.getvalue() + said


def test_colours_go_to_terminals_that_take_them(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")

    def shown(colours: bool = True) -> str:
        screen, notes = Screen(), Screen()
        chat.reset()
        Terminal(chat, console(screen), console(notes), lines(questions()[0]), colours).run()
        return screen.getvalue() + notes.getvalue()

    assert "\x1b[32m" in shown() and "\x1b[2m" in shown()
    assert "\x1b[32m" not in shown(colours=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in shown()
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in shown()
    assert console(io.StringIO()).color_system is None


def test_what_a_model_says_is_no_command_to_the_terminal(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    terminal = Terminal(chat, console(screen), console(Screen()), lines())
    terminal.show("a\x1b[2Jb\x07\u200d\x9bc\td\n", False)
    assert screen.getvalue().replace("\x1b[0m", "") == "a[2Jb\u200dc\td\n"


def test_ctrl_c_stops_first_and_leaves_then() -> None:
    before = signal.getsignal(signal.SIGINT)
    with ctrl_c() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
    assert signal.getsignal(signal.SIGINT) == before


def test_lines_are_read_with_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "said")
    assert reader()() == "said" and asked == [""]  # not from a terminal: no prompt among the answers
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    assert reader()() == "said" and asked[1:] == [PROMPT]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)  # not installed
    assert reader()() == "said" and asked[2:] == [PROMPT]


def test_a_draft_is_saved_into_a_folder_of_its_own(chat: Chat, tmp_path: Path) -> None:
    """Neither among other files nor over another draft; over its own earlier state it is."""
    kept, other, mine = (tmp_path / name for name in ("kept", "other", "mine"))
    OnlineDraft(tiny_llama(2), OnlineSpecConfig(rank=2)).save_pretrained(other)
    mine.mkdir()
    (mine / "README.md").write_text("mine")
    notes = io.StringIO()
    asked = [f"/save {folder}" for folder in (kept, other, mine, kept)]
    terminal = Terminal(chat, Console(file=io.StringIO()), Console(file=notes, width=300), lines(*asked, "/quit"))
    assert terminal.run() == 0
    said = notes.getvalue().splitlines()
    assert said[0] == said[3] == f"Saved: {kept}. Go on with --draft {kept}."
    assert said[1] == f"/save {other}: another draft was saved there. Name a new folder."
    assert "'README.md' lies there" in said[2] and (mine / "README.md").read_text() == "mine"
    assert Manifest.read(other).settings["rank"] == 2


def test_leaving_saves(chat: Chat, tmp_path: Path) -> None:
    def leave() -> str:
        raise KeyboardInterrupt

    notes = io.StringIO()
    reads = iter([lambda: questions()[0], leave])
    terminal = Terminal(
        chat, Console(file=io.StringIO()), Console(file=notes), lambda: next(reads)(), save=tmp_path / "kept"
    )
    assert terminal.run() == 130
    assert Manifest.read(tmp_path / "kept").serving.requests == 1
    assert "Saved" in notes.getvalue()


def test_errors_are_told_and_the_chat_goes_on(chat: Chat) -> None:
    notes = io.StringIO()
    assert (
        Terminal(chat, Console(file=io.StringIO()), Console(file=notes), lines("ls " * 600, questions()[0])).run() == 0
    )
    assert "begin anew with /reset" in notes.getvalue() and chat.answers == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--save", "x"], "--save without --draft"),
        (["--system", "be \udcff"], "--system: character 4 is"),
        (["--new-tokens", "0"], "--new-tokens 0"),
        (["--temperature", "-1"], "--temperature -1"),
        (["--draft", "nowhere at all"], "neither a folder nor a name on the Hub"),
        (["--device", "nowhere"], "--device nowhere"),
    ],
)
def test_bad_arguments(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], process_settings: None
) -> None:
    assert main(["chat", str(FOLDER / "target"), *arguments]) == 2
    errors = capsys.readouterr().err
    assert words in errors and "Traceback" not in errors


def test_in_a_pipe_answers_stand_alone_on_stdout() -> None:
    text = prompts("shell")[0]
    command = [sys.executable, "-m", "hf_onlinespec", "chat", str(FOLDER / "target"), "--draft", str(FOLDER / "draft")]
    done = subprocess.run(
        [*command, "--new-tokens", "8", "--device", "cpu"],
        input=f"{text.splitlines()[0]}\n/stats\n/quit\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and "tokens/s" not in done.stdout
    assert "tokens per target forward" in done.stderr and "answers: 1, in" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
