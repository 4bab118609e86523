"""Pairs of gloo processes, each with a draft of its own: python tests/processes.py FOLDER. What each has seen is in FOLDER/*.json.

One interpreter imports everything, and forks them: they wait for each other through files and collectives, never for a time.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from hf_onlinespec import OnlineDraft
from tests.drafts import flat_params
from tests.tiny_models import tiny_llama

PATIENCE_S = 240.0  # of a machine with much else to do; nothing is decided by it but that something hangs
DIED = 7  # exit status of a process that ends in the middle of a request


class Pair:
    """One of two processes."""

    def __init__(self, folder: Path, name: str, rank: int) -> None:
        self.rank, self._folder, self._name = rank, folder, name
        patience = timedelta(seconds=PATIENCE_S)
        place = folder / f"{name}.port"
        port = 0 if rank == 0 else int(self.wait_for(place))
        store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, patience, wait_for_workers=False)
        if rank == 0:
            self.tell(place, str(store.port))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=patience)
        self.target = tiny_llama(1)
        self.draft = OnlineDraft(
            tiny_llama(2), lookahead=3, update_every=1, memory_tokens=0, replay_passes=1, average_every=4
        )
        self.texts = torch.Generator().manual_seed(rank)

    def serve(self, requests: int, **arguments: Any) -> None:
        for _ in range(requests):
            prompt = torch.randint(1, 32, (1, 6), generator=self.texts)
            self.target.generate(prompt, assistant_model=self.draft, max_new_tokens=6, **arguments)

    def meet(self) -> bool:
        """Both have the same adapter afterwards."""
        done = self.draft.catch_up(PATIENCE_S)
        dist.barrier()
        return self.draft.catch_up(PATIENCE_S) and done

    def file(self, name: str) -> Path:
        return self._folder / f"{self._name}.{name}"

    def tell(self, place: Path, text: str = "") -> None:
        part = place.with_suffix(f".part{self.rank}")
        part.write_text(text)
        part.rename(place)

    def wait_for(self, place: Path) -> str:
        end = time.monotonic() + PATIENCE_S
        while not place.exists():
            if time.monotonic() > end:
                raise TimeoutError(place)
            time.sleep(0.05)
        return place.read_text()

    def report(self, **seen: Any) -> None:
        self.tell(self.file(f"{self.rank}.json"), json.dumps(seen))

    def params(self) -> list[float]:
        return flat_params(self.draft).tolist()


class Dies(StoppingCriteria):
    """Ends the process after its third token."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.shape[1] >= 9:
            self._place.write_text("")
            os._exit(DIED)
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Never(StoppingCriteria):
    """With it and without a token that ends a text, rows are decoded plainly: `generate` lets them write on."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(len(input_ids), dtype=torch.bool)


def two_then_one(pair: Pair) -> None:
    """Both learn, one lags, one dies in the middle of a request: rank 1."""
    seen: dict[str, Any] = {"start": pair.params()}
    pair.serve(1)
    seen["led"] = pair.params()
    dist.barrier()  # nothing is published before: two gradient steps are fewer than four
    seen["met"] = pair.meet()
    seen["mean"] = pair.params()
    pair.serve(3)
    pair.meet()
    seen["together"] = pair.params()
    pair.draft.save_pretrained(pair.file(f"saved_by_{pair.rank}"))

    done, dying = pair.file("done_alone"), pair.file("dying")
    if pair.rank == 1:  # it serves nothing before the other one has served everything
        pair.wait_for(done)
        pair.serve(2)
        seen["published"] = pair.draft.catch_up(PATIENCE_S)
        pair.report(**seen)
        pair.serve(1, stopping_criteria=StoppingCriteriaList([Dies(dying)]))
    before = pair.draft.metrics.averages
    pair.serve(4)
    seen["averages_alone"] = pair.draft.metrics.averages - before
    pair.tell(done)
    pair.wait_for(dying)
    seen["caught_up"] = pair.draft.catch_up(PATIENCE_S)
    seen["with_the_last_words"] = pair.params()
    pair.serve(3)
    seen["caught_up_again"] = pair.draft.catch_up(PATIENCE_S)
    pair.draft.save_pretrained(pair.file("left"))
    seen["left"] = pair.params()
    seen["requests"] = pair.draft.metrics.requests
    pair.report(**seen)


def without_the_first(pair: Pair) -> None:
    """Rank 0, whose process holds the store, dies: the other one learns on alone, and saves."""
    pair.serve(2)
    pair.meet()
    dying = pair.file("dying")
    if pair.rank == 0:
        dist.barrier()
        pair.serve(1, stopping_criteria=StoppingCriteriaList([Dies(dying)]))
    together = pair.params()
    dist.barrier()
    pair.wait_for(dying)
    pair.serve(4)
    caught_up = pair.draft.catch_up(PATIENCE_S)
    pair.draft.save_pretrained(pair.file("left"), is_main_process=True)
    reason = pair.draft.metrics.decisions.averaging
    pair.report(together=together, caught_up=caught_up, left=pair.params(), reason=reason)


class Sharded(LlamaForCausalLM):
    """As under ZeRO-3 or FSDP: each forward waits for one of the other process. One too many or too few, and both hang."""

    alone = False  # for a forward that is no part of the story
    forwards = 0

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any
    ) -> Any:
        if not Sharded.alone:
            Sharded.forwards += 1
            dist.all_reduce(torch.ones(64))  # of another size than what the loops say to each other
        return super().forward(input_ids, attention_mask, position_ids, **kwargs)


def in_step(pair: Pair) -> None:
    """Both hold one target, and write texts of different lengths at the same time."""
    whole, sharded = tiny_llama(1, layers=2), Sharded(tiny_llama(1, layers=2).config).eval()
    sharded.load_state_dict(whole.state_dict())
    sharded.generation_config = whole.generation_config
    vars(sharded)["_is_fsdp_managed_module"] = True  # as FSDP notes it: generate() and ours ask for it
    if pair.rank == 0:  # one of them has tried the target before
        Sharded.alone = True
        sharded.generate(torch.tensor([[3, 14]]), onlinespec=True, synced_gpus=False, max_new_tokens=2)
        Sharded.alone = False
    dist.barrier()
    equal, forwards, told = [], [], []
    near = tiny_llama(1, layers=2)
    torch.manual_seed(0)
    with torch.no_grad():
        near.lm_head.weight += 0.3 * torch.randn_like(near.lm_head.weight)
    draft = OnlineDraft(near, lookahead=3, update_every=1, average_every=4)
    longest = 14
    cases: list[tuple[int, int, int, dict[str, Any]]] = [  # rows, prompt and new tokens of this process
        (1, 6, (3, longest)[pair.rank], {"assistant_model": draft}),
        (1, 9 + pair.rank, (longest, 2)[pair.rank], {"assistant_model": draft}),
        (1, 5, (4, longest)[pair.rank], {"assistant_model": draft, "do_sample": True}),
        (1, 12, (longest, 5)[pair.rank], {"onlinespec": True}),
        (3 - pair.rank, 6, (longest, 3)[pair.rank], {"assistant_model": draft}),
        (2 - pair.rank, 6, (4, longest)[pair.rank], {"assistant_model": draft}),
        (2, 6, 8, {"assistant_model": draft} | ({"stopping_criteria": [Never()]} if pair.rank else {})),
        (1, 6, (1, longest)[pair.rank], {"custom_generate": draft.generate_fn()}),
    ]
    for rows, length, new, arguments in cases:
        prompt = torch.randint(1, 32, (rows, length), generator=pair.texts)
        sampled = arguments.get("do_sample", False)
        before = Sharded.forwards
        torch.manual_seed(0)
        synced = {} if "custom_generate" in arguments else {"synced_gpus": True}
        out = sharded.generate(prompt, max_new_tokens=new, **(synced | {"do_sample": False} | arguments))
        forwards.append(Sharded.forwards - before)
        plain = whole.generate(prompt, max_new_tokens=new, do_sample=False)
        equal.append(torch.equal(out, plain) or (sampled and out.shape == plain.shape))
        told.append(draft.metrics.decisions.drafting)
    pair.report(
        equal=equal, forwards=forwards, told=told, rounds=draft.metrics.rounds, kept=draft.metrics.accepted_tokens
    )


STORIES: dict[str, Callable[[Pair], None]] = {
    "two_then_one": two_then_one,
    "without_the_first": without_the_first,
    "in_step": in_step,
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    children = {}
    for name, story in STORIES.items():
        for rank in range(2):
            child = os.fork()
            if not child:
                status = 1
                try:
                    story(Pair(folder, name, rank))
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            children[child] = f"{name}.{rank}"
    ended = {name: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child, name in children.items()}
    (folder / "ended.json").write_text(json.dumps(ended))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
