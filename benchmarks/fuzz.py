"""Random calls of `generate(onlinespec=...)` beside plain `generate`: target × draft × settings × arguments × cache × failures.

    python benchmarks/fuzz.py --cases 10000 --seed 1
    python benchmarks/fuzz.py --seed 1 --start 4711 --cases 1     # one case alone, as it was

A case is drawn from (seed, number) alone: tiny models, settings, and two or three requests that a draft or the memory serves.
Its clock is drawn too, so that a case decides the same on any machine. Each request is answered by plain `generate` and by ours:

equal     the same tokens, streamed tokens, scores, calls of processors and criteria; sampled: a text that plain could have written
tie       they part where plain's two best scores are closer than 1e-4: rounding decides there
refused   an OnlineSpecError that the case gives reason for, see REFUSALS
raised    both raise the same, or plain alone does, where the padding of rows that have ended runs past its positions
anything else is printed with its number, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from fuzz_answers import PLAIN_ALONE, named
from fuzz_cases import Case, draw_case
from fuzz_objects import Fresh
from fuzz_requests import Request
from fuzz_running import run_case
from torch import Tensor
from transformers.utils import logging as transformers_logging

from hf_onlinespec import OnlineSpecConfig


@dataclass
class Report:
    """What came of many cases."""

    outcomes: Counter[str] = field(default_factory=Counter)  # of requests
    counts: Counter[str] = field(default_factory=Counter)  # of tokens, gradient steps and failures
    unexplained: list[str] = field(default_factory=list)
    cases: int = 0


def fuzz(cases: int, seed: int, start: int = 0, say: Callable[[str], None] = print) -> Report:
    """Runs that many cases and says what is not explained, as it comes up."""
    report = Report()
    for number in range(start, start + cases):
        try:
            case, found = run_case(seed, number)
        except Exception as error:
            found = [f"the fuzzer itself: {named(error)}"]
            case = draw_case(seed, number)
        report.cases += 1
        report.counts += case.counts
        for i, outcome in enumerate(found):
            good = outcome in ("equal", "tie", PLAIN_ALONE) or outcome.startswith(("refused: ", "raised: "))
            report.outcomes[outcome if good else "unexplained"] += 1
            if not good:
                request = case.requests[i] if i < len(case.requests) else None
                report.unexplained.append(f"case {number}, request {i + 1}: {outcome}")
                say(f"{report.unexplained[-1]}\n    {describe(case, request)}")
        if report.cases % 100 == 0:
            say(f"{report.cases} cases: {dict(report.outcomes)}")
    return report


def describe(case: Case, request: Request | None) -> str:
    default = OnlineSpecConfig().to_dict()
    settings = {k: v for k, v in case.settings.to_dict().items() if v != default[k]}
    words = f"target {case.target}; draft {case.draft or 'none'} {case.wrapped}; failure {case.failure}; {settings}"
    if request is None:
        return words
    how = {k: _short(v) for k, v in request.arguments.items()}
    flags = [request.turn, "inference_mode" * request.inference_mode, "as_config" * request.as_config, request.through]
    flags += [] if request.adapter is None else [f"adapter={request.adapter}"]
    return f"{words}\n    prompt {request.prompt.tolist()} {how} {' '.join(filter(None, flags))}"


def _short(value: object) -> object:
    if isinstance(value, Tensor):
        return tuple(value.shape) if value.is_floating_point() else value.tolist()
    return "…" if isinstance(value, Fresh) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    args = parser.parse_args()
    quiet()
    started = time.perf_counter()
    report = fuzz(args.cases, args.seed, args.start, lambda words: print(words, flush=True))
    seconds = time.perf_counter() - started
    print(f"{report.cases} cases in {seconds:.0f} s, {sum(report.outcomes.values())} requests")
    for outcome, n in report.outcomes.most_common():
        print(f"{n:7d}  {outcome}")
    print(", ".join(f"{name.replace('_', ' ')} {n}" for name, n in report.counts.items()))
    return 1 if report.unexplained else 0


def quiet() -> None:
    """One thread, and no words about what is asked for on purpose."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    logging.getLogger("hf_onlinespec").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
