"""Warm start: the draft is distilled from its target offline, and knows a domain before it serves the first request.

The embedded draft has never seen orders. The target writes notes to other orders, the draft learns them.

    python examples/02_warm_start.py [training prompts] [test prompts]
"""

import sys
import tempfile

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.embedded import load_draft, load_pair, prompts
from hf_onlinespec.training.warm_start import warm_start

train = int(sys.argv[1]) if len(sys.argv) > 1 else 60
test = int(sys.argv[2]) if len(sys.argv) > 2 else 20
pair = load_pair()
orders = prompts("orders")


def acceptance_length(draft: OnlineDraft) -> float:
    """Tokens per target forward on the test prompts; the draft only drafts."""
    tokens = rounds = 0
    for prompt in orders[:test]:
        inputs = pair.tokenizer(prompt, return_tensors="pt")
        pair.target.generate(**inputs, max_new_tokens=48, assistant_model=draft, onlinespec=False)
        tokens, rounds = tokens + draft.metrics.last.new_tokens, rounds + draft.metrics.last.rounds
    return tokens / rounds


# The draft alone, without the memory, five tokens a round: that shows what it has learned.
draft = OnlineDraft(load_draft(), OnlineSpecConfig(lookahead=5, update_every=1, memory_tokens=0))
cold = acceptance_length(draft)
print(f"cold: {cold:.2f} tokens per target forward on {test} unseen prompts")

warm_start(draft, pair.target, pair.tokenizer, prompts=orders[test : test + train], new_tokens=48)
with tempfile.TemporaryDirectory() as folder:
    draft.save_pretrained(folder)  # the same artifact as a draft that evolved online
    draft = OnlineDraft.from_pretrained(folder)
warm = acceptance_length(draft)
print(f"warm: {warm:.2f} after {train} other prompts, {warm / cold:.2f} times")
