"""The shortest use of hf_onlinespec: `onlinespec=True`, and the draft learns while it serves.

The embedded draft was trained on shell commands and is asked for SQL here.

    python examples/01_drop_in.py [requests]
"""

import sys

import torch

import hf_onlinespec
from hf_onlinespec.embedded import load_pair, prompts

requests = int(sys.argv[1]) if len(sys.argv) > 1 else 20
pair = load_pair()
target, draft, tokenizer = pair.target, pair.draft, pair.tokenizer

tokens = rounds = 0
for i, prompt in enumerate(prompts("orders")[:requests], start=1):
    inputs = tokenizer(prompt, return_tensors="pt")
    output = target.generate(**inputs, max_new_tokens=48, assistant_model=draft, onlinespec=True)

    last = hf_onlinespec.online_draft(draft).metrics.last
    tokens, rounds = tokens + last.new_tokens, rounds + last.rounds
    if i % 5 == 0 or i == requests:
        print(f"requests to {i:3d}: {tokens / rounds:.2f} tokens per target forward")
        tokens = rounds = 0

plain = target.generate(**inputs, max_new_tokens=48)
print("last output:", "identical to plain generate" if torch.equal(output, plain) else "differs from plain generate")
print(tokenizer.decode(output[0], skip_special_tokens=True))

metrics = hf_onlinespec.online_draft(draft).metrics
print(f"acceptance_length   {metrics.acceptance_length:.2f}")
print(f"tokens_per_s        {metrics.tokens_per_s:.0f} (learning included)")
print(f"decode_tokens_per_s {metrics.decode_tokens_per_s:.0f} (learning left out)")
print(f"update_share        {metrics.update_share:.0%}")
