"""What `hf-onlinespec serve` does: everything that can be refused is refused before a model is loaded."""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
import sys
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cli.common import FAILED, check_extra, check_saving, quiet_libraries
from ..cli.loading import best_device, load_config, load_pair, load_tokenizer
from ..commit.base import Draft
from ..errors import ConfigError
from ..generation import attach
from ..share.folder import is_artifact
from ..share.loading import locate

BACKLOG = 2048  # connections that wait to be taken: uvicorn's own default
GRACE_S = 5  # for requests at hand when the server is told to end; chosen: half of what `docker stop` waits
OPEN = (
    "hf-onlinespec: warning: the server can be reached from other machines at {host}. It asks nobody for a key: whoever reaches it "
    "can generate, and see at /onlinespec and /metrics how much others do. Put a proxy in front that asks for keys and passes /v1 alone."
)


def serve(
    target: str,
    draft: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    save: Path | None = None,
    save_every: int = 100,
    isolate: bool = False,
    batch: int = 8,
    allow_remote: bool = False,
    device: str | None = None,
    dtype: str = "auto",
) -> int:
    """Serves until Ctrl-C or SIGTERM, and saves the draft then; the exit code.

    Args:
        target, draft: a folder, or a name on the Hub; the draft also a saved one.
        save: where the draft is saved; if one was saved there before, that one goes on.
        save_every: requests between two saves; 0: only at the end.
        isolate: one suffix memory per API key.
        batch: requests that are decoded together; 1: one after the other.
        allow_remote: needed for a `host` that other machines reach.

    Raises:
        ConfigError, DraftError, ArtifactError, HubError, MissingExtraError: in one line; nothing was served.
    """
    check_extra("server", "serve")
    if save_every < 0:
        raise ConfigError(f"--save-every {save_every}: expected a number of requests, or 0 to save only at the end.")
    if batch < 1:
        raise ConfigError(
            f"--batch {batch}: expected a number of requests that are decoded together, or 1 for one by one."
        )
    check_saving(save, draft, resumes=True)
    listener = _listen(host, port, allow_remote)
    quiet_libraries(bars=True)
    # For somebody who stops a service this is Ctrl-C; uvicorn gives both back once it has ended.
    terminates = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        place, resumes = best_device(device), save is not None and is_artifact(save)
        config, tokenizer = load_config("TARGET", target), load_tokenizer("TARGET", target)
        from . import app  # noqa: F401  # of a transformers that it was not written for, it says so before weights are read

        is_model = draft is not None and locate(draft).folder is None
        _say(f"Loading {target} …")
        name, base = (str(save), draft if is_model else None) if resumes else (draft, None)
        model, found = load_pair(target, name, config, tokenizer, dtype, place, base)
        drafts = attach(model, found)
        if resumes:
            print(f"The draft saved in {save} goes on: {drafts.metrics.requests:,} requests so far.")
        return serve_model(
            model, tokenizer, drafts, target, draft, listener, save, save_every, isolate, batch, allow_remote
        )
    finally:
        listener.close()
        signal.signal(signal.SIGTERM, terminates)


def _listen(host: str, port: int, allow_remote: bool) -> socket.socket:
    """The server's socket, not yet listening. Raises ConfigError where the port is not free."""
    if not 0 <= port < 2**16:
        raise ConfigError(f"--port {port}: expected a number from 1 to 65535, or 0 for any that is free.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host}: this machine has no such address ({error}). Use 127.0.0.1.") from error
    if not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        if not allow_remote:
            raise ConfigError(
                f"--host {host}: other machines could reach the server, which asks nobody for a key. Add --allow-remote if that is "
                "meant, or use 127.0.0.1."
            )
        _say(OPEN.format(host=host))
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that ended a minute ago
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror}). Name another port, or 0 for any that is free."
        ) from error
    return listener


def _say(text: str) -> None:
    """For whoever waits; stdout has results alone."""
    print(text, file=sys.stderr, flush=True)


def serve_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drafts: Draft,
    target: str,
    draft: str | None,
    listener: socket.socket,
    save: Path | None,
    save_every: int,
    isolate: bool,
    batch: int,
    allow_remote: bool,
) -> int:
    """Serves a model with what is attached to it until it is stopped, and saves the draft; the exit code."""
    import uvicorn

    # Only now: they need the packages of the extra.
    from .app import LOCAL, Served, build_app
    from .saving import DraftSaver

    log = logging.getLogger("hf_onlinespec.serve")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    address = listener.getsockname()
    name = f"[{address[0]}]" if ":" in address[0] else address[0]
    url = f"http://{name}:{address[1]}"
    hosts = None if allow_remote else (*LOCAL, name)
    served = Served(target, model, tokenizer, drafts, draft, save, save_every, isolate, batch, hosts)
    app = build_app(served)
    listener.listen(BACKLOG)  # before the address is announced: whoever reads it may connect at once
    print(
        f"Serving {target} at {url}/v1 (model name: {target!r}). Page: {url}/onlinespec, metrics: {url}/metrics.",
        flush=True,
    )
    # uvicorn would log what a fault raises with its text, which may be a request's; the app logs faults itself.
    config = uvicorn.Config(
        app, backlog=BACKLOG, log_level="critical", access_log=False, timeout_graceful_shutdown=GRACE_S
    )
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn ended as it should, and hands the signal on
        pass
    saver: DraftSaver | None = app.state.saver
    if saver is not None:
        if not saver.worked:  # a second Ctrl-C came before that
            saver.worked = saver.save()
        print(f"The draft is {'' if saver.worked else 'not '}saved in {saver.folder}.", flush=True)
    log.removeHandler(handler)
    return 0 if saver is None or saver.worked else FAILED
