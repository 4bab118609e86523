"""The target is fine-tuned, and the draft with it: a callback of the Trainer keeps the two aligned.

The embedded target learns to write its order notes in another wording. Two equal drafts know the old one: one is left
alone, one learns from the batches of the training.

    python examples/04_target_fine_tune.py [steps] [training prompts] [test prompts]
"""

import sys
import tempfile
from pathlib import Path

from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from hf_onlinespec import OnlineDraft, OnlineSpecConfig
from hf_onlinespec.embedded import load_draft, load_pair, prompts
from hf_onlinespec.training.alignment import DraftAlignment
from hf_onlinespec.training.warm_start import warm_start

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
train = int(sys.argv[2]) if len(sys.argv) > 2 else 100
test = int(sys.argv[3]) if len(sys.argv) > 3 else 20
pair = load_pair()
tokenizer, orders = pair.tokenizer, prompts("orders")
tokenizer.pad_token = tokenizer.eos_token


def reworded(prompt: str) -> str:
    """A note on the order of a prompt, as the target does not write it yet."""
    order = dict(line.split(": ") for line in prompt.splitlines()[:-1])  # the last line is "note:"
    n, price, first = int(order["quantity"]), int(order["price"]), order["customer"].split()[0]
    paid = "which is paid, thank you" if order["payment"] == "paid" else "which you pay later by invoice"
    wrap = " in gift paper" if order["gift"] == "yes" else ""
    return (
        f" Dear {first}, we packed {n} {order['item']}s for you{wrap}. They cost {n} x {price} = {n * price}, {paid}. "
        f"{order['shipping'].capitalize()} post brings them to {order['city']} soon."
    )


def example(prompt: str) -> dict[str, list[int]]:
    asked, said = tokenizer(prompt).input_ids, tokenizer(reworded(prompt)).input_ids
    return {"input_ids": asked + said, "labels": [-100] * len(asked) + said}


def acceptance_length(draft: OnlineDraft) -> float:
    """Tokens per target forward on the test prompts; the draft only drafts."""
    tokens = rounds = 0
    for prompt in orders[:test]:
        inputs = tokenizer(prompt, return_tensors="pt")
        pair.target.generate(**inputs, max_new_tokens=48, assistant_model=draft, onlinespec=False)
        tokens, rounds = tokens + draft.metrics.last.new_tokens, rounds + draft.metrics.last.rounds
    return tokens / rounds


with tempfile.TemporaryDirectory() as folder:
    draft = OnlineDraft(load_draft(), OnlineSpecConfig(lookahead=5, update_every=1, memory_tokens=0))
    seen = orders[test : test + train]
    warm_start(draft, pair.target, tokenizer, prompts=seen[: train // 2], new_tokens=48)
    draft.save_pretrained(Path(folder) / "before")
    print(f"before the fine-tune        {acceptance_length(draft):.2f} tokens per target forward")

    alignment = DraftAlignment(draft)
    args = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=3e-4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    collate = DataCollatorForSeq2Seq(tokenizer)
    data = [example(prompt) for prompt in seen]
    trainer = Trainer(pair.target, args, train_dataset=data, data_collator=collate, callbacks=[alignment])
    seconds = trainer.train().metrics["train_runtime"]
    pair.target.eval()

    alone = OnlineDraft.from_pretrained(Path(folder) / "before")

inputs = tokenizer(orders[0], return_tensors="pt")
answer = pair.target.generate(**inputs, max_new_tokens=48)[0, inputs.input_ids.shape[1] :]
print("the target writes now      ", tokenizer.decode(answer, skip_special_tokens=True))
left, kept = acceptance_length(alone), acceptance_length(draft)
print(f"draft that was left alone   {left:.2f}")
print(f"draft that was kept aligned {kept:.2f}, {kept / left:.2f} times")
print(
    f"alignment took {alignment.time_s:.1f} of {seconds:.1f} s, {alignment.updates} steps on {alignment.tokens} tokens"
)
