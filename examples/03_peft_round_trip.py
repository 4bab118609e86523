"""An evolved draft is an ordinary PEFT adapter: it goes through any fine-tune and comes back to serve and learn.

python examples/03_peft_round_trip.py [requests] [test prompts]
"""

import sys
import tempfile
from pathlib import Path

from peft import PeftModel
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.embedded import load_draft, load_pair, prompts

requests = int(sys.argv[1]) if len(sys.argv) > 1 else 40
test = int(sys.argv[2]) if len(sys.argv) > 2 else 20
pair = load_pair()
orders = prompts("orders")
settings = OnlineSpecConfig(lookahead=5, update_every=1, memory_tokens=0)  # the draft alone, and repeatable


def serve(draft: OnlineDraft, asked: list[str], learn: bool) -> tuple[list[list[int]], float]:
    """The target's answers with their prompts, as tokens, and how many tokens came with each of its forwards."""
    answers, tokens, rounds = [], 0, 0
    for prompt in asked:
        inputs = pair.tokenizer(prompt, return_tensors="pt")
        out = pair.target.generate(**inputs, max_new_tokens=48, assistant_model=draft, onlinespec=learn)
        answers.append(out[0].tolist())
        tokens, rounds = tokens + draft.metrics.last.new_tokens, rounds + draft.metrics.last.rounds
    return answers, tokens / rounds


def report(stage: str, draft: OnlineDraft) -> None:
    print(f"{stage:28} {serve(draft, orders[:test], learn=False)[1]:.2f} tokens per target forward")


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)

    draft = OnlineDraft(load_draft(), settings)
    report("base draft", draft)
    text, _ = serve(draft, orders[test : test + requests], learn=True)
    report(f"after {requests} requests online", draft)
    draft.save_pretrained(folder / "evolved")

    # Out: nothing here knows of hf_onlinespec.
    model = PeftModel.from_pretrained(load_draft(), folder / "evolved", is_trainable=True)
    pair.tokenizer.pad_token = pair.tokenizer.eos_token
    args = TrainingArguments(
        output_dir=str(folder / "trainer"),
        num_train_epochs=4,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    collate = DataCollatorForLanguageModeling(pair.tokenizer, mlm=False)
    Trainer(model, args, train_dataset=[{"input_ids": t} for t in text], data_collator=collate).train()
    model.save_pretrained(folder / "tuned", save_embedding_layers=False)  # the adapter, without a copy of the embedding

    # Back: a new state of the learner, from these weights on.
    draft = OnlineDraft.from_pretrained(folder / "tuned", base_model=load_draft(), config=settings)
    report("fine-tuned with PEFT", draft)
    serve(draft, orders[test + requests : test + 2 * requests], learn=True)
    report(f"{requests} more requests online", draft)
