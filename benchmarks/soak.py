"""A server under four clients whose prompts drift, killed every few minutes and started again: what is lost, what is wrong, what grows.

    python benchmarks/soak.py --minutes 120 --kill-every-s 600
    python benchmarks/soak.py --minutes 6 --kill-every-s 120 --save-every 20

The server is the command, with the embedded pair and `--save`. Each client asks for one greedy answer after the other, of a domain
that changes in the middle of each life of the server; some stream, and some hang up in the middle. Every answer is held against what the
target said plainly before the soak began. What was asked when the server was killed is asked again of the next one. After a restart the draft
must go on from no earlier than the last save that the killed one had counted. RSS and threads of the server are read every second.
The exit code is 1 where an answer was wrong or lost, a request failed while the server was up, or learned state was lost.
"""

from __future__ import annotations

import argparse
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers.utils import logging

from hf_onlinespec.embedded import DOMAINS, FOLDER, load_pair, prompts

SEED = 0
PATIENCE_S = 300.0  # for an answer, and for a start
CLIENTS = 4
HANGS_UP_EVERY = 23  # requests of a client
RETRY_S = 2.0  # of a client whose server is not there
HTTP = httpx.Client(
    timeout=PATIENCE_S, limits=httpx.Limits(max_keepalive_connections=0)
)  # a new one costs more than a request


def plain_answers(texts: list[str], most: int) -> dict[str, str]:
    """What the target says to each prompt by itself."""
    pair, found = load_pair(), {}
    for text in texts:
        inputs = pair.tokenizer(text, return_tensors="pt")
        tokens = pair.target.generate(**inputs, max_new_tokens=most, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        found[text] = pair.tokenizer.decode(tokens, skip_special_tokens=True)
    return found


@dataclass
class Life:
    """The server from a start to its end."""

    process: subprocess.Popen[str]
    url: str
    resumed: int  # requests that the draft went on from
    started_at: float
    rss_mib: list[float] = field(default_factory=list)  # every second
    threads: list[int] = field(default_factory=list)
    page: dict[str, Any] = field(default_factory=dict)  # the last one that was read

    def look(self) -> None:
        """Reads sizes and the page of the server."""
        try:
            status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
            rss, threads = re.search(r"VmRSS:\s+(\d+)", status), re.search(r"Threads:\s+(\d+)", status)
            self.page = HTTP.get(f"{self.url}/onlinespec.json").json()
        except (OSError, httpx.HTTPError):  # it has ended
            return
        if rss and threads:
            self.rss_mib.append(int(rss[1]) / 1024)
            self.threads.append(int(threads[1]))

    def line(self) -> str:
        totals, quarter = self.page["totals"], max(1, len(self.rss_mib) // 4)
        parts = [
            statistics.median(part)
            for part in (self.rss_mib[quarter : 2 * quarter] or self.rss_mib, self.rss_mib[-quarter:])
        ]
        return (
            f"{time.monotonic() - self.started_at:.0f} s, {totals['requests']} requests ({totals['stopped']} hung up, {totals['failed']} "
            f"failed), acceptance length {self.page['acceptance_length']:.2f}, {self.page['saves']['done']} saves; RSS in its second "
            f"quarter {parts[0]:.0f} MiB, in its last {parts[1]:.0f}; {min(self.threads)} to {max(self.threads)} threads"
        )


class Soak:
    """Clients and the server that they ask.

    Args:
        expected: per prompt the answer.
    """

    def __init__(
        self, args: argparse.Namespace, folder: Path, expected: dict[str, str], domains: list[list[str]]
    ) -> None:
        self._args, self._folder, self._expected, self._domains = args, folder, expected, domains
        self.life: Life | None = None
        self.ended = threading.Event()
        self.faults: list[str] = []
        self.answers = self.again = 0
        self._count = threading.Lock()

    def start(self) -> Life:
        command = [sys.executable, "-m", "hf_onlinespec_cli", "serve", str(FOLDER / "target"), "--port", "0"]
        command += ["--draft", str(FOLDER / "draft"), "--save", str(self._folder / "draft")]
        command += ["--save-every", str(self._args.save_every), "--batch", str(self._args.batch)]
        with (self._folder / "server.log").open("a", encoding="utf-8") as log:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        said, resumed = process.stdout.readline(), 0
        if "goes on" in said:
            resumed = int(said.split("goes on: ")[1].split()[0].replace(",", ""))
            said = process.stdout.readline()
        self.life = Life(process, said.split()[3].removesuffix("/v1"), resumed, time.monotonic())
        return self.life

    def ask(self, client: int) -> None:
        """A client, until the end."""
        numbers, n = random.Random(SEED + client), 0
        while not self.ended.is_set():
            life = self.life
            assert life is not None
            late = time.monotonic() - life.started_at > self._args.kill_every_s / 2
            text = numbers.choice(self._domains[late])
            n += 1
            if n % HANGS_UP_EVERY == 0:
                self._hang_up(text)
            else:
                self._answer(text, streams=n % 3 == 0)

    def _answer(self, text: str, streams: bool) -> None:
        """Asks until there is an answer."""
        while not self.ended.is_set():
            life = self.life
            assert life is not None
            try:
                said = self._said(life, text, streams)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                if life is self.life and life.process.poll() is None and not self.ended.wait(1):
                    if life is self.life and life.process.poll() is None:
                        self._fault(f"a request failed while the server was up: {error!r}")
                with self._count:
                    self.again += 1
                self.ended.wait(RETRY_S)
                continue
            with self._count:
                self.answers += 1
            if said != self._expected[text]:
                self._fault(f"{said!r} in place of {self._expected[text]!r}")
            return

    def _said(self, life: Life, text: str, streams: bool) -> str:
        body = {"model": str(FOLDER / "target"), "prompt": text, "max_tokens": self._args.new_tokens, "stream": streams}
        url = f"{life.url}/v1/completions"
        if not streams:
            answer = HTTP.post(url, json=body)
            answer.raise_for_status()
            return str(answer.json()["choices"][0]["text"])
        pieces, ended = [], False
        with HTTP.stream("POST", url, json=body) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    chunk = httpx.Response(200, content=line.removeprefix("data: ")).json()
                    pieces += [choice["text"] or "" for choice in chunk["choices"]]
                    ended = ended or any(choice.get("finish_reason") for choice in chunk["choices"])
        if not ended:
            raise ValueError("a stream has ended before its time")
        return "".join(pieces)

    def _hang_up(self, text: str) -> None:
        life = self.life
        assert life is not None
        body = {"model": str(FOLDER / "target"), "prompt": text, "max_tokens": 200, "stream": True}
        try:
            with HTTP.stream("POST", f"{life.url}/v1/completions", json=body) as answer:
                next(answer.iter_lines())
        except (httpx.HTTPError, StopIteration):
            pass

    def _fault(self, text: str) -> None:
        with self._count:
            self.faults.append(text)
        print(f"FAULT: {text}", flush=True)

    def live(self, seconds: float) -> None:
        """Looks at the server for so long."""
        life = self.life
        assert life is not None
        until = time.monotonic() + seconds
        while time.monotonic() < until and life.process.poll() is None:
            life.look()
            time.sleep(1)
        if life.process.poll() is not None:
            self._fault(f"the server has ended by itself, with {life.process.returncode}")

    def kill(self) -> None:
        """The server is killed, and started again."""
        life = self.life
        assert life is not None
        print(life.line(), flush=True)
        least = life.resumed + self._args.save_every * int(life.page["saves"]["done"])
        life.process.kill()
        life.process.wait()
        again = self.start()
        print(f"killed; the next one goes on from {again.resumed} requests, at least {least} were saved", flush=True)
        if again.resumed < least:
            self._fault(f"the draft went on from {again.resumed} requests: {least} were saved")

    def stop(self) -> None:
        """The end: clients have their answers, and the server saves its draft."""
        life = self.life
        assert life is not None
        print(life.line(), flush=True)
        life.process.send_signal(signal.SIGTERM)
        try:
            if life.process.wait(PATIENCE_S):
                self._fault(f"the server has ended with {life.process.returncode}")
        finally:
            life.process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--kill-every-s", type=float, default=600)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=24, help="of each domain")
    parser.add_argument("--new-tokens", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    domains = [prompts(domain)[: args.prompts] for domain in DOMAINS[:2]]
    expected = plain_answers([text for own in domains for text in own], args.new_tokens)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soak, lives = Soak(args, Path(folder), expected, domains), list[Life]()
        lives.append(soak.start())
        clients = [threading.Thread(target=soak.ask, args=(n,), daemon=True) for n in range(CLIENTS)]
        for client in clients:
            client.start()
        ends = time.monotonic() + 60 * args.minutes
        while True:
            soak.live(min(args.kill_every_s, max(1.0, ends - time.monotonic())))
            if time.monotonic() >= ends or lives[-1].process.poll() is not None:
                break
            soak.kill()
            assert soak.life is not None
            lives.append(soak.life)
        soak.ended.set()
        for client in clients:
            client.join(PATIENCE_S)
            if client.is_alive():
                soak.faults.append("a client still waits for its answer")
        soak.stop()
        log = (Path(folder) / "server.log").read_text(encoding="utf-8")
    rss = [max(life.rss_mib) for life in lives]
    print(
        f"{len(lives)} lives, {soak.answers} answers, {soak.again} asked again; most RSS of each life: "
        f"{', '.join(f'{one:.0f}' for one in rss)} MiB; most threads: {', '.join(str(max(life.threads)) for life in lives)}; "
        f"{log.count('Traceback')} tracebacks in the server's log; {len(soak.faults)} faults",
        flush=True,
    )
    sys.exit(1 if soak.faults else 0)


if __name__ == "__main__":
    main()
