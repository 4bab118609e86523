"""Shared fixtures.

Tiny random models for exactness, the embedded pair for learning, a Hub in memory, the data folder where it is at hand.
"""

from __future__ import annotations

import logging as logging_of_python
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import close_session, constants, file_download, hf_api
from huggingface_hub.utils import _http
from transformers import PreTrainedModel
from transformers.utils import hub as transformers_hub
from transformers.utils import logging

from hf_onlinespec.embedded import EmbeddedPair, load_pair
from tests.loopback_hub import LoopbackHub
from tests.tiny_models import tiny_gpt2, tiny_llama

__all__ = ["tiny_gpt2", "tiny_llama"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "failures: what fails beside decoding is meant to, see failures.py")


@pytest.fixture(autouse=True, scope="session")
def few_threads() -> None:
    """Tiny models on many threads run many times slower."""
    torch.set_num_threads(1)


@pytest.fixture
def process_settings() -> Iterator[None]:
    """A command line sets what belongs to its process; the other tests get theirs back."""
    threads, verbosity, bar = torch.get_num_threads(), logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)
    if bar:
        logging.enable_progress_bar()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_hidden_failures(request: pytest.FixtureRequest) -> Iterator[None]:
    """What fails beside decoding costs no answer, and would hide in a test that looks at answers: marked `failures`, it may."""
    told = _Told()
    log = logging_of_python.getLogger("hf_onlinespec.runtime.failures")
    log.addHandler(told)
    yield
    log.removeHandler(told)
    assert not told.texts or request.node.get_closest_marker("failures"), told.texts


class _Told(logging_of_python.Handler):
    def __init__(self) -> None:
        super().__init__(logging_of_python.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging_of_python.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextmanager
def answered() -> Iterator[None]:
    """An answer, or the refusal that a test asks for, is due here: whatever else is raised fails the test by an assertion."""
    try:
        yield
    except AssertionError:
        raise
    except Exception as error:
        raise AssertionError(f"instead of an answer: {error!r}") from error


@pytest.fixture
def target() -> PreTrainedModel:
    return tiny_llama(1, layers=2)


@pytest.fixture
def draft_model() -> PreTrainedModel:
    return tiny_llama(2)


@pytest.fixture
def prompt() -> torch.Tensor:
    return torch.tensor([[3, 14, 15, 9, 2, 6]])


@pytest.fixture(scope="session")
def pair() -> EmbeddedPair:
    """The embedded pair. Its draft is never handed to an OnlineDraft by `onlinespec=True`: use `load_draft()` for that."""
    return load_pair()


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder named by HF_ONLINESPEC_DATA; tests that need it are skipped without it."""
    folder = os.environ.get("HF_ONLINESPEC_DATA")
    if not folder:
        pytest.skip("HF_ONLINESPEC_DATA is not set: it names a folder with models/ and streams/")
    return Path(folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """A Hub in memory that the clients of this process, and of its children, talk to with its owner's token.

    The cache is empty, and the waits of huggingface_hub between two attempts take no time: `hub.waits` lists them.
    """
    close_session()  # the shared connections know the proxies of the real environment
    with warnings.catch_warnings(), LoopbackHub() as hub:
        # This is how huggingface_hub itself sends large files.
        warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)
        home = str(tmp_path_factory.mktemp("hf_home"))
        # Read when the client is imported, so for child processes; only HF_TOKEN is read at each call.
        environment = dict(HF_ENDPOINT=hub.endpoint, HF_HOME=home, HF_HUB_CACHE=f"{home}/hub", HF_TOKEN=hub.token)
        environment |= dict(HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", HF_TOKEN_PATH=f"{home}/token")
        environment |= dict(NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
        for name, text in environment.items():
            monkeypatch.setenv(name, text)
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_OIDC_RESOURCE", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        # What the client of this process made of them, and looks up at each call.
        here = dict(ENDPOINT=hub.endpoint, HF_HOME=home, HF_HUB_CACHE=f"{home}/hub", HF_TOKEN_PATH=f"{home}/token")
        here |= dict(HUGGINGFACE_CO_URL_TEMPLATE=hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        here |= dict(HF_HUB_DISABLE_XET=True, HF_HUB_DISABLE_TELEMETRY=True, HF_HUB_OFFLINE=False)
        for name, value in here.items():
            monkeypatch.setattr(constants, name, value)
        # Two clients outlive a call and keep their endpoint: that of huggingface_hub's functions, and transformers'.
        monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)
        monkeypatch.setattr(transformers_hub, "_hf_api", None)
        clock = SimpleNamespace(**vars(time) | {"sleep": hub.waits.append})
        monkeypatch.setattr(_http, "time", clock)
        monkeypatch.setattr(file_download, "time", clock)
        yield hub
        close_session()
