"""The command line `hf-onlinespec`: options and help. It stands outside the package, so that `--help` imports nothing heavy.

A command imports `hf_onlinespec` in its body and returns its exit code; what it raises becomes one line here.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036  run from a checkout, nothing else has looked at the version
    print(
        "hf-onlinespec: error: Python {}.{} is too old: 3.10 or later is needed.".format(*sys.version_info[:2]),
        file=sys.stderr,
    )
    sys.exit(2)

import functools
import io
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Annotated, ParamSpec

try:
    import typer
except ImportError:
    print("hf-onlinespec: error: the command line needs typer: run pip install typer and try again.", file=sys.stderr)
    sys.exit(2)

P = ParamSpec("P")
FAILED, INTERRUPTED = 2, 130
# For somebody who ends a command or closes its window, these are Ctrl-C: what is known is told, and saved. Windows has no SIGHUP.
ENDINGS = [signal.Signals[name] for name in ("SIGTERM", "SIGHUP") if name in signal.Signals.__members__]
EXIT_CODES = (
    "Exit codes: 0 success; 1 something was found that should not be there (try: an answer differs by more than rounding; "
    "audit: a public push would be refused; run: a prompt failed); "
    "2 a wrong argument, a missing package, or an error told in one line; 130 interrupted (Ctrl-C, SIGTERM)."
)
MODELS, RUN, OUTPUT = "Models", "Run", "Output"  # panels of the help

app = typer.Typer(
    help="Faster generate() with a draft that learns from use; in float32 the text is that of plain generate().",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if vars(sys)[name] is None:  # closed by whoever started it
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that the terminal does not have costs no result
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        app(args=one_by_one(arguments, "--weights"), prog_name="hf-onlinespec")
    except SystemExit as stopped:
        return stopped.code if isinstance(stopped.code, int) else FAILED
    return 0


def one_by_one(arguments: list[str], option: str) -> list[str]:
    """The same with `--weights 0.25 0.75` as `--weights 0.25 --weights 0.75`: typer takes one value after an option."""
    found: list[str] = []
    listing = False
    for argument in arguments:
        if listing and found[-1] != option and _is_number(argument):
            found.append(option)
        found.append(argument)
        listing = argument == option or (listing and _is_number(argument))
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def reports_errors(command: Callable[P, int]) -> Callable[P, None]:
    """A command that ends the process with its exit code, and whose errors are one line on stderr."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        if "torch" not in sys.modules and sys.stderr.isatty():  # that takes some seconds
            print("Loading torch and transformers …", file=sys.stderr, flush=True)
        ended: list[signal.Signals] = []
        if threading.current_thread() is threading.main_thread():
            ended = [s for s in ENDINGS if signal.getsignal(s) is signal.SIG_DFL]  # else somebody has decided: nohup
        try:
            for ending in ended:
                signal.signal(ending, signal.default_int_handler)
            code = command(*args, **kwargs)
        except KeyboardInterrupt:
            print("\nhf-onlinespec: interrupted; no result was completed.", file=sys.stderr)
            code = INTERRUPTED
        except (BrokenPipeError, SystemExit):  # the reader of our output has gone; rich says it by the latter
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = 0
        except Exception as error:
            line = _explained(error)
            if line is None:
                raise
            print(f"hf-onlinespec: error: {' '.join(line.split())}", file=sys.stderr)
            code = FAILED
        finally:
            for ending in ended:
                signal.signal(ending, signal.SIG_DFL)
        raise typer.Exit(code)

    return run


def _explained(error: Exception) -> str | None:
    if isinstance(
        error, ImportError
    ):  # a missing package, or one whose version does not fit: then the package is not there
        line = " ".join(str(error).split())
        if type(error).__module__ == "hf_onlinespec.errors":
            return line
        try:
            needed = [text for text in metadata.requires("hf_onlinespec") or () if "extra ==" not in text]
        except metadata.PackageNotFoundError:  # run from a folder where it is not installed
            return f"{line.rstrip('.')}. hf_onlinespec is not installed: run pip install -e . in its folder."
        return f"{line.rstrip('.')}. hf_onlinespec needs {', '.join(needed)}."
    from hf_onlinespec.cli.common import explain

    return explain(error)


def _version_of(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _version(wanted: bool) -> None:
    if wanted:
        names = ("hf_onlinespec", "torch", "transformers", "peft")
        own, *others = (f"{name} {_version_of(name)}" for name in names)
        print(f"{own} (Python {sys.version.split()[0]}, {', '.join(others)})")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the versions and exit.")
    ] = False,
) -> None:
    pass


class Domain(str, Enum):
    """Domains of the embedded pair that its draft was not trained on."""

    orders = "orders"
    sql = "sql"


class HeadForm(str, Enum):
    """What `--form` takes."""

    eagle3 = "eagle3"
    speculators = "speculators"


class Dtype(str, Enum):
    """What `--dtype` takes."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


DtypeOption = Annotated[
    Dtype,
    typer.Option(
        help="Precision of the models; auto: as stored (float16 becomes float32 on a CPU).", rich_help_panel=MODELS
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="Where the models run, such as cuda or cpu.",
        show_default="an accelerator where there is one",
        rich_help_panel=MODELS,
    ),
]
TargetOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME_OR_PATH",
        help="The model to be accelerated: a folder or a name on the Hub.",
        rich_help_panel=MODELS,
    ),
]
DraftOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME_OR_PATH",
        help="A smaller one with the same tokenizer, or a draft head of the target: a folder or a name on the Hub.",
        rich_help_panel=MODELS,
    ),
]
OwnDraftOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME_OR_PATH",
        help="A smaller model with the same tokenizer, a draft head of the target, or a saved draft.",
        show_default="the suffix memory drafts alone",
        rich_help_panel=MODELS,
    ),
]
EmbeddedOption = Annotated[
    bool, typer.Option("--embedded", help="Use the pair that ships with the package.", rich_help_panel=MODELS)
]
PromptsOption = Annotated[
    Path,
    typer.Option(metavar="FILE", help='Lines of JSON, {"prompt": "..."}, in their order.', rich_help_panel=RUN),
]
NewTokensOption = Annotated[
    int, typer.Option(metavar="N", help="Most tokens generated per prompt.", rich_help_panel=RUN)
]
LimitOption = Annotated[
    int | None,
    typer.Option(metavar="N", help="Use the first N prompts only.", show_default="all", rich_help_panel=RUN),
]
TemperatureOption = Annotated[float, typer.Option(metavar="T", help="0: greedy decoding.", rich_help_panel=RUN)]
SeedOption = Annotated[int, typer.Option(help="Seeds the sampling.", rich_help_panel=RUN)]
BaseOption = Annotated[
    str | None,
    typer.Option(metavar="NAME_OR_PATH", help="The base draft.", show_default="the one that it was made for"),
]
HeadTargetOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME_OR_PATH",
        help="Of a draft head: the model that it drafts for.",
        show_default="the one that it learned for",
    ),
]


@app.command("try")
@reports_errors
def try_(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="The model to be accelerated: a folder or a name on the Hub.")
    ],
    draft: OwnDraftOption = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Your prompts: lines of JSON, {"prompt": "..."}, with a "domain" where you like, or lines of a .txt file.',
            show_default="about sixty that ship with the package",
            rich_help_panel=RUN,
        ),
    ] = None,
    minutes: Annotated[
        float, typer.Option(metavar="M", help="What it may take, loading included.", rich_help_panel=RUN)
    ] = 3.5,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Most tokens generated per prompt.",
            show_default="up to 96, fewer where the model is slow",
            rich_help_panel=RUN,
        ),
    ] = None,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="An HTML report with the curves.", rich_help_panel=OUTPUT),
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="All numbers, for machines.", rich_help_panel=OUTPUT)
    ] = None,
    save: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="The evolved draft.", rich_help_panel=OUTPUT)
    ] = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
) -> int:
    """Try it on your own model: does it pay, and are the answers the same?

    Sends real prompts through plain generation, transformers' prompt lookup (and its assisted generation, with a model as --draft) and
    ours, in turns, for about three minutes. Says how fast each is, whether every answer is plain generation's, what was
    learned, and what to paste into your code. Exit code 1: an answer of ours differs by more than rounding.

    Example: `hf-onlinespec try HuggingFaceTB/SmolLM2-135M-Instruct --dtype bfloat16 --out report.html`
    """
    started_s = time.perf_counter()
    from hf_onlinespec.cli.trial import TrySettings, run_try

    settings = TrySettings(
        target, draft, prompts, minutes, out, json, save, device, dtype.value, new_tokens, temperature, seed
    )
    return run_try(settings, started_s)


@app.command()
@reports_errors
def chat(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The model: a folder or a name on the Hub.")],
    draft: OwnDraftOption = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.", rich_help_panel=RUN)] = None,
    new_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens of an answer.", rich_help_panel=RUN)] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(
            metavar="T",
            help="0: greedy decoding.",
            show_default="as the model's generation_config says",
            rich_help_panel=RUN,
        ),
    ] = None,
    no_colour: Annotated[
        bool, typer.Option("--no-colour", "--no-color", help="Do not colour drafted text.", rich_help_panel=OUTPUT)
    ] = False,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Save the evolved draft on leaving.", rich_help_panel=OUTPUT),
    ] = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
) -> int:
    """Chat with a model that speculates and learns.

    Text that was drafted and accepted has another colour than the target's own tokens; a line under each answer says how
    fast it came. Ctrl-C stops an answer. In the chat: /help, /reset, /plain, /colours, /stats, /save FOLDER, /quit.
    From a pipe every line is a message, and answers alone go to stdout.

    Example: `hf-onlinespec chat HuggingFaceTB/SmolLM2-135M-Instruct`
    """
    from hf_onlinespec.cli.terminal import ChatSettings, run_chat

    return run_chat(
        ChatSettings(target, draft, system, new_tokens, temperature, not no_colour, save, dtype.value, device)
    )


@app.command()
@reports_errors
def serve(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="The model to be served: a folder or a name on the Hub.")
    ],
    draft: OwnDraftOption = None,
    host: Annotated[str, typer.Option(help="Address to listen at.", rich_help_panel=RUN)] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0: any that is free.", rich_help_panel=RUN)] = 8000,
    allow_remote: Annotated[
        bool,
        typer.Option(
            "--allow-remote", help="Let other machines in; the server asks nobody for a key.", rich_help_panel=RUN
        ),
    ] = False,
    isolate: Annotated[
        bool, typer.Option("--isolate", help="Keep one suffix memory for each API key.", rich_help_panel=RUN)
    ] = False,
    batch: Annotated[
        int,
        typer.Option(
            metavar="N", help="Requests that are decoded together; 1: one after the other.", rich_help_panel=RUN
        ),
    ] = 8,
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Save the draft there at the end; one that is there already goes on.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    save_every: Annotated[
        int, typer.Option(metavar="N", help="Requests between two saves; 0: only at the end.", rich_help_panel=OUTPUT)
    ] = 100,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
) -> int:
    """Serve a model over OpenAI's API, faster the more it is used.

    Chat completions, completions and responses on transformers' own serving code, with metrics for Prometheus at /metrics and a
    live page at /onlinespec. Needs pip install "hf_onlinespec[serve]".

    Example: `hf-onlinespec serve Qwen/Qwen2.5-7B-Instruct --draft Qwen/Qwen2.5-0.5B-Instruct --save my-draft`
    """
    from hf_onlinespec.serve.run import serve as run_serve

    return run_serve(target, draft, host, port, save, save_every, isolate, batch, allow_remote, device, dtype.value)


@app.command()
@reports_errors
def run(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The model: a folder or a name on the Hub.")],
    prompts: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help='Lines of JSON, {"prompt": "..."} or {"messages": [...]}, with an "id" where you like, or lines of a .txt file.',
            rich_help_panel=RUN,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="The answers, lines of JSON, as they are finished; those that are there already stay.",
            rich_help_panel=OUTPUT,
        ),
    ],
    draft: OwnDraftOption = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", help="Prompts that are answered at a time.", rich_help_panel=RUN)
    ] = 8,
    new_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens of an answer.", rich_help_panel=RUN)] = 256,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Save the evolved draft there; one that is there already goes on.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    save_every: Annotated[
        int, typer.Option(metavar="N", help="Prompts between two saves; 0: only at the end.", rich_help_panel=OUTPUT)
    ] = 500,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed",
            help="Try prompts again that failed before: a new line is appended, and the last line of a prompt counts.",
            rich_help_panel=RUN,
        ),
    ] = False,
) -> int:
    """Answer a file of prompts in batches, faster the more of them there are.

    Each answer is written as it is finished. An interrupted command goes on where it ended when it is given again, also after
    prompts were added to the end of the file; with other prompts or settings, or while another one writes into --out, it refuses. A
    prompt that fails has an "error" in the place of a "text"; exit code 1: there are such prompts.

    Example: `hf-onlinespec run HuggingFaceTB/SmolLM2-135M-Instruct --prompts in.jsonl --out out.jsonl`
    """
    from hf_onlinespec.cli.run import RunSettings, run_prompts

    return run_prompts(
        RunSettings(
            target,
            prompts,
            out,
            draft,
            batch_size,
            new_tokens,
            temperature,
            seed,
            save,
            save_every,
            dtype.value,
            device,
            retry_failed,
        )
    )


@app.command()
@reports_errors
def demo(
    prompts: Annotated[
        int, typer.Option(metavar="N", help="Prompts in each of the three segments.", rich_help_panel=RUN)
    ] = 30,
    domain: Annotated[
        Domain, typer.Option(help="Domain of the middle segment, new to the draft.", rich_help_panel=RUN)
    ] = Domain.orders,
    new_tokens: NewTokensOption = 64,
    temperature: TemperatureOption = 0.0,
    seed: Annotated[int, typer.Option(help="Chooses the prompts and seeds the sampling.", rich_help_panel=RUN)] = 0,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of what is written.", rich_help_panel=OUTPUT)] = Path(
        "demo-out"
    ),
    json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON instead of tables.", rich_help_panel=OUTPUT)
    ] = False,
    threads: Annotated[int, typer.Option(metavar="N", help="Threads of torch.", rich_help_panel=RUN)] = min(
        2, os.cpu_count() or 1
    ),
) -> int:
    """Measure plain, assisted and learning generation on the embedded pair.

    Streams prompts of one domain, of a second one and of the first again through four ways of generating: plain,
    transformers' assisted generation with its best number of draft tokens, ours with a frozen draft, and ours learning.
    No network, about three minutes on two cores.

    Example: `hf-onlinespec demo --prompts 10 --domain sql`
    """
    from hf_onlinespec.cli.measure import Settings, run_demo

    return run_demo(Settings(prompts, domain.value, new_tokens, temperature, seed, threads), out, json)


@app.command()
@reports_errors
def record(
    prompts: PromptsOption,
    out: Annotated[
        Path, typer.Option(metavar="RUN", help="The recording: a .safetensors file.", rich_help_panel=OUTPUT)
    ],
    target: TargetOption = None,
    draft: DraftOption = None,
    embedded: EmbeddedOption = False,
    new_tokens: NewTokensOption = 64,
    limit: LimitOption = None,
    temperature: TemperatureOption = 0.0,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    seed: SeedOption = 0,
) -> int:
    """Record what a target says to your prompts, for `regret`.

    Writes the target's answers and distributions to a file, so that learning can be replayed without the target.

    Example: `hf-onlinespec record --target ./target --draft ./draft --prompts mine.jsonl --out run.safetensors`
    """
    from hf_onlinespec.cli.measure import OwnModels, run_record

    models = OwnModels(target, draft, embedded, dtype.value, device)
    return run_record(models, prompts, out, new_tokens, limit, temperature, seed)


@app.command()
@reports_errors
def regret(
    run_file: Annotated[Path, typer.Argument(metavar="RUN", help="A recording made by hf-onlinespec record.")],
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_PATH",
            help="The draft.",
            show_default="the one that was recorded for",
            rich_help_panel=MODELS,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_PATH",
            help="Of a draft head: the model that it drafts for, which reads every request once.",
            show_default="the one that was recorded",
            rich_help_panel=MODELS,
        ),
    ] = None,
    config: Annotated[
        str, typer.Option(metavar="JSON", help='Settings of the draft, such as {"lr": 1e-3}.', rich_help_panel=RUN)
    ] = "{}",
    lookahead: Annotated[int, typer.Option(metavar="K", help="Drafted tokens.", rich_help_panel=RUN)] = 5,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder of regret.json and regret.png.", rich_help_panel=OUTPUT)
    ] = Path("regret-out"),
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
) -> int:
    """Show what learning lost against hindsight on a recorded stream, and what theory promises.

    Replays a recorded stream through a learning draft, and through the best adapters in hindsight, for the whole stream
    and for each of its segments (runs of one domain).

    Example: `hf-onlinespec regret run.safetensors --out regret-out`
    """
    from hf_onlinespec.cli.measure import run_regret

    return run_regret(run_file, draft, target, config, lookahead, out, dtype.value, device)


@app.command()
@reports_errors
def inspect(
    source: Annotated[str, typer.Argument(metavar="FOLDER_OR_REPO", help="A saved draft, or a draft head.")],
    revision: Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit on the Hub.")] = None,
) -> int:
    """Show what an evolved draft is, and what it measured; of a draft head which it is, and what it reads.

    Example: `hf-onlinespec inspect demo-out/evolved`
    """
    from hf_onlinespec.cli.drafts import run_inspect

    return run_inspect(source, revision)


@app.command()
@reports_errors
def head(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The model: a folder or a name on the Hub.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The head.", rich_help_panel=OUTPUT)],
    prompts: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE",
            help='Prompts such as it will serve: lines of JSON, {"prompt": "..."}, with a "domain" where you like; may be given again.',
            rich_help_panel=RUN,
        ),
    ],
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="For answers and checkpoints, from which an interrupted command goes on.",
            show_default="FOLDER.work, beside the head",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens of an answer.", rich_help_panel=RUN)] = 128,
    batch_size: Annotated[
        int, typer.Option(metavar="N", help="Answers that are written at once.", rich_help_panel=RUN)
    ] = 16,
    draft_vocab: Annotated[
        int, typer.Option(metavar="N", help="Tokens that the head can propose.", rich_help_panel=RUN)
    ] = 8192,
    epochs: Annotated[int, typer.Option(metavar="N", help="Passes over the answers.", rich_help_panel=RUN)] = 4,
    learning_rate: Annotated[float, typer.Option(metavar="R", help="Of AdamW.", rich_help_panel=RUN)] = 2e-3,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    seed: Annotated[
        int, typer.Option(help="Of sampled answers, and of the order of training.", rich_help_panel=RUN)
    ] = 0,
) -> int:
    """Build a draft head for a model that has none.

    The model writes answers to your prompts, and an EAGLE-3 head learns to foretell them. Some thousand prompts are a start: the card
    says how well it drafts on answers that were held out. The same command goes on after an interruption.

    Example: `hf-onlinespec head HuggingFaceTB/SmolLM2-135M-Instruct --prompts mine.jsonl --out my-head`
    """
    from hf_onlinespec.cli.head import HeadSettings, run_head

    return run_head(
        HeadSettings(
            target,
            out,
            prompts,
            work,
            new_tokens,
            batch_size,
            draft_vocab,
            epochs,
            learning_rate,
            dtype.value,
            device,
            seed,
        )
    )


@app.command()
@reports_errors
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What save_pretrained wrote.")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="Where to.")],
    public: Annotated[bool, typer.Option("--public", help="Make it public.")] = False,
    data_statement: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What it was trained on, and why it may be public.")
    ] = None,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="Of the commit.")] = None,
    tag: Annotated[str | None, typer.Option(metavar="NAME", help="A name for this state.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Over another's commit.")] = False,
    skip_audit: Annotated[bool, typer.Option("--skip-audit", help="For text that is public anyway.")] = False,
    with_state: Annotated[
        bool, typer.Option("--with-state", help="Also what learning needs to go on (private: always).")
    ] = False,
    license: Annotated[str | None, typer.Option(metavar="NAME", help="Of the adapter, as the Hub names it.")] = None,
    base: BaseOption = None,
    target: HeadTargetOption = None,
) -> int:
    """Push a saved draft to the Hub.

    Sends a folder in one commit. Repositories are private unless --public is given, which needs a data statement and passes
    the privacy audit first.

    Example: `hf-onlinespec push demo-out/evolved me/my-draft --tag first`
    """
    from hf_onlinespec.cli.drafts import run_push

    return run_push(
        folder,
        repo,
        public=public,
        data_statement=data_statement,
        message=message,
        tag=tag,
        force=force,
        skip_audit=skip_audit,
        with_state=with_state,
        license=license,
        base=base,
        target=target,
    )


@app.command()
@reports_errors
def pull(
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="A draft on the Hub.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new one, or one with an earlier state.")],
    revision: Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit.")] = None,
) -> int:
    """Download an evolved draft into a folder.

    Example: `hf-onlinespec pull me/my-draft ./my-draft`
    """
    from hf_onlinespec.cli.drafts import run_pull

    return run_pull(repo, folder, revision)


@app.command()
@reports_errors
def merge(
    sources: Annotated[
        list[str], typer.Argument(metavar="FOLDER_OR_REPO...", help="One draft, or several of one base.")
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="A new folder.")],
    weights: Annotated[
        list[float] | None,
        typer.Option(metavar="W...", help="One for each draft.", show_default="their mean"),
    ] = None,
    rank: Annotated[int | None, typer.Option(metavar="R", help="Distil to this rank.")] = None,
    base: BaseOption = None,
    export: Annotated[
        bool, typer.Option("--export", help="Write a plain causal language model, or an ordinary draft head.")
    ] = False,
    form: Annotated[
        HeadForm | None,
        typer.Option(help="Of an EAGLE-3 head that is exported.", show_default="the one that it was read in"),
    ] = None,
    target: HeadTargetOption = None,
) -> int:
    """Combine evolved drafts, distil them to a rank, or merge them into a plain model.

    Combines drafts of one base exactly: the rank of the result is the sum of theirs. --rank distils it, --export writes a
    plain causal language model for transformers, vLLM or SGLang instead of an adapter; of draft heads an ordinary head, for
    vLLM and SGLang (--form eagle3) or vLLM (--form speculators).

    Example: `hf-onlinespec merge ./a ./b --weights 0.25 0.75 --out ./both`
    """
    from hf_onlinespec.cli.drafts import run_merge

    return run_merge(sources, out, weights or None, rank, base, export, None if form is None else form.value, target)


@app.command()
@reports_errors
def audit(
    source: Annotated[str, typer.Argument(metavar="FOLDER_OR_REPO", help="A saved draft.")],
    canaries: Annotated[int, typer.Option(metavar="N", help="How many secrets are planted.")] = 8,
    own: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Texts of its stream: .txt, or .jsonl with text lines.")
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Texts of the same kind that it never saw.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="NAME_OR_PATH", help="For the texts.", show_default="the base's")
    ] = None,
    base: BaseOption = None,
    target: HeadTargetOption = None,
    seed: Annotated[int, typer.Option(help="Chooses the canaries.")] = 0,
) -> int:
    """Show what an evolved draft gives away of the text it learned from.

    Plants canaries, secrets drawn at random, in a copy of the draft and probes how exposed they are; with texts it also
    compares the draft's own stream with text that it never saw. Exit code 1: a public push would be refused.

    Example: `hf-onlinespec audit demo-out/evolved --canaries 8`
    """
    from hf_onlinespec.cli.drafts import run_audit

    return run_audit(source, canaries, own, held_out, tokenizer, base, seed, target)


if __name__ == "__main__":
    sys.exit(main())
