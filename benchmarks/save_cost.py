"""What saving costs: seconds and bytes for an adapter of ten million parameters.

    python benchmarks/save_cost.py

A random Llama, default settings, after enough updates that everything there is to save exists. Medians; the first save, which
makes the files, is told apart.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.adapt.feedback import Teacher
from hf_onlinespec.adapt.segment import Segment
from hf_onlinespec.metrics import Counts
from hf_onlinespec.share.folder import ADAPTER, STATE

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/ is not installed

from tests.tiny_models import tiny_llama


def model() -> LlamaForCausalLM:
    shape = dict(intermediate_size=1536, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=2048)
    return tiny_llama(0, vocab=8192, layers=8, hidden=512, **shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| learner | adapter, parameters | first save, s | save, s | load, s | adapter file ÷ adapter | state file ÷ adapter |"
    )
    print("|---|---|---|---|---|---|---|")
    for learner, rank in (("optimistic", 105), ("ensemble", 35)):
        draft = OnlineDraft(model(), OnlineSpecConfig(learner=learner, rank=rank, alpha=float(rank), update_every=1))
        for seed in range(10):
            tokens = torch.randint(8192, (1, 48), generator=torch.Generator().manual_seed(seed))
            draft.learning.learn_segment(
                Segment(tokens, [Teacher.from_logits(torch.randn(40, 8192))], None, 1.0), Counts()
            )
        guard = draft.learning.learner.guard
        while len(guard.states) < draft.settings.snapshots:  # as many earlier states as there may be
            guard._keep(draft.learning.learner.experts.best_params())
        size = draft.trainable.adapter.params.nbytes
        with tempfile.TemporaryDirectory() as folder:
            spent = []
            for _ in range(args.repeats + 1):
                started = time.perf_counter()
                draft.save_pretrained(folder)
                spent.append(time.perf_counter() - started)
            base = model()
            started = time.perf_counter()
            OnlineDraft.from_pretrained(folder, base_model=base)
            load_s = time.perf_counter() - started
            files = [(Path(folder) / name).stat().st_size / size for name in (ADAPTER, STATE)]
        print(
            f"| {learner} | {draft.trainable.adapter.params.numel():,} | {spent[0]:.2f} | {statistics.median(spent[1:]):.2f} "
            f"| {load_s:.2f} | {files[0]:.3f} | {files[1]:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
