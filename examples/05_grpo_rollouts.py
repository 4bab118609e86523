"""Rollouts of reinforcement learning: the policy changes in every step, and the draft follows it.

GRPO teaches the embedded target to open its notes on orders with the customer's name. The draft is attached once, and whatever
the trainer samples comes through it. After each step two things are compared with plain `generate` of the policy as it is then:
the time that sampling takes, and greedy answers, which have to be the same.

    pip install trl; python examples/05_grpo_rollouts.py [steps]
"""

import sys
import tempfile
import time

import torch
from datasets import Dataset
from transformers import BatchEncoding, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

import hf_onlinespec
from hf_onlinespec.embedded import load_pair, prompts

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 24
pair = load_pair()
policy, tokenizer, orders = pair.target, pair.tokenizer, prompts("orders")
tokenizer.pad_token = tokenizer.eos_token


def batch(step: int) -> BatchEncoding:
    """Eight prompts, others in each step."""
    some = (orders + orders)[8 * step % 200 :][:8]
    return tokenizer(some, padding=True, padding_side="left", return_tensors="pt")


def opens_with_the_name(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    names = [prompt.partition("customer: ")[2].partition("\n")[0] for prompt in prompts]
    return [float(text.startswith(" " + name)) for name, text in zip(names, completions, strict=True)]


class Comparison(TrainerCallback):
    """After each step: sampled and greedy answers to eight prompts, as attached and plainly."""

    def __init__(self) -> None:
        self.same, self.lengths = 0, []
        self.tokens, self.seconds = [0, 0], [0.0, 0.0]  # sampled: plainly, as attached

    def on_step_end(self, args, state, control, **kwargs) -> None:
        test = batch(state.global_step)
        before = draft.metrics.rounds, draft.metrics.new_tokens
        for attached in (0, 1) if state.global_step % 2 else (1, 0):
            clock = time.perf_counter()
            rows = policy.generate(**test, max_new_tokens=48, do_sample=True, onlinespec=None if attached else False)
            self.seconds[attached] += time.perf_counter() - clock
            self.tokens[attached] += int((rows[:, test.input_ids.shape[1] :] != tokenizer.pad_token_id).sum())
        rounds, tokens = draft.metrics.rounds - before[0], draft.metrics.new_tokens - before[1]
        self.lengths.append(tokens / rounds)
        greedy = [policy.generate(**test, max_new_tokens=48, do_sample=False, onlinespec=on) for on in (None, False)]
        self.same += torch.equal(*greedy)


comparison = Comparison()
draft = hf_onlinespec.attach(policy, pair.draft)
before = policy.generate(**batch(0), max_new_tokens=48, do_sample=False)
with tempfile.TemporaryDirectory() as folder:
    args = GRPOConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=48,
        learning_rate=3e-5,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
    )
    data = Dataset.from_dict({"prompt": orders})
    trainer = GRPOTrainer(policy, opens_with_the_name, args, data, processing_class=tokenizer, callbacks=[comparison])
    trainer.remove_callback(PrinterCallback)
    trainer.train()

rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
print("reward           ", " ".join(f"{reward:.2f}" for reward in rewards))
print("acceptance length", " ".join(f"{length:.2f}" for length in comparison.lengths))
print(f"greedy answers equal plain generate's after {comparison.same} of {steps} steps")
after = policy.generate(**batch(0), max_new_tokens=48, do_sample=False)
for tokens in before, after:
    print(tokenizer.decode(tokens[0, batch(0).input_ids.shape[1] :], skip_special_tokens=True))
plain, ours = (tokens / seconds for tokens, seconds in zip(comparison.tokens, comparison.seconds, strict=True))
print(f"rollouts: {ours:.0f} tokens/s as attached, {plain:.0f} plainly, {ours / plain:.2f} times")
print(draft.metrics)
