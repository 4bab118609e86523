"""An encoder-decoder target: questions become SQL, and the draft learns a domain that it never saw.

The target of the pair that ships with the package knows both domains, its draft was trained on WikiSQL alone. The stream begins
with WikiSQL questions and goes on with questions about a university's courses.

    python examples/06_sequence_to_sequence.py [--requests 40]
    python examples/06_sequence_to_sequence.py --model Helsinki-NLP/opus-mt-en-de
    python examples/06_sequence_to_sequence.py --model google-t5/t5-base --draft google-t5/t5-small --prefix "translate English to German: "
    python examples/06_sequence_to_sequence.py --model facebook/nllb-200-distilled-600M --language deu_Latn

Another model translates the questions; without a draft, the suffix memory drafts for it.
"""

import argparse
import time

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_onlinespec import OnlineDraft, OnlineSpecConfig, online_memory
from hf_onlinespec.embedded import SEQ2SEQ_DOMAINS, load_seq2seq_draft, load_seq2seq_pair, questions

parser = argparse.ArgumentParser()
parser.add_argument("--requests", type=int, default=40, help="half of them of each domain")
parser.add_argument("--model", help="an encoder-decoder on the Hub or in a folder; default: the shipped pair")
parser.add_argument("--draft", help="a smaller one with its tokenizer")
parser.add_argument("--prefix", default="", help="goes before each question, for T5")
parser.add_argument("--language", help="what NLLB or mBART translate into: the decoder's first token")
parser.add_argument("--new-tokens", type=int, default=200)
args = parser.parse_args()


def load_draft():
    return AutoModelForSeq2SeqLM.from_pretrained(args.draft).eval() if args.draft else load_seq2seq_draft()


if args.model is None:
    pair = load_seq2seq_pair()
    target, tokenizer = pair.target, pair.tokenizer
else:
    target = AutoModelForSeq2SeqLM.from_pretrained(args.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
options = {"max_new_tokens": args.new_tokens, "do_sample": False, "num_beams": 1}
if args.language:
    options["forced_bos_token_id"] = tokenizer.convert_tokens_to_ids(args.language)

# Every question goes through all ways of generating before the next one.
ways = {"plain": {}}
drafts = {}
if args.model is None or args.draft:
    alone = OnlineSpecConfig(memory_tokens=0, recycle=False)
    drafts = {"frozen draft": OnlineDraft(load_draft(), alone), "learning draft": OnlineDraft(load_draft())}
    ways["frozen draft"] = {"assistant_model": drafts["frozen draft"], "onlinespec": False}
    ways["learning draft"] = {"assistant_model": drafts["learning draft"]}
else:
    drafts["suffix memory"] = online_memory(target)
    ways["suffix memory"] = {"onlinespec": True}

same = True
for domain in SEQ2SEQ_DOMAINS:
    tokens, seconds, rounds = (dict.fromkeys(ways, 0) for _ in range(3))
    for question in questions(domain)[: args.requests // 2]:
        inputs = tokenizer(args.prefix + question, return_tensors="pt")
        outputs = {}
        for way, arguments in ways.items():
            started = time.perf_counter()
            outputs[way] = target.generate(
                input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, **options, **arguments
            )
            seconds[way] += time.perf_counter() - started
            new_tokens = outputs[way].shape[1] - 1  # without the decoder's start token
            tokens[way] += new_tokens
            rounds[way] += drafts[way].metrics.last.rounds if way in drafts else new_tokens
        same = same and all(torch.equal(output, outputs["plain"]) for output in outputs.values())
    print(f"{domain}: {question}\n  {tokenizer.decode(outputs['plain'][0], skip_special_tokens=True)}")
    for way in ways:
        speed = f"{tokens[way] / seconds[way]:6.0f} tokens/s, learning included"
        ratio = seconds["plain"] / seconds[way]
        print(f"  {way:14} {tokens[way] / rounds[way]:5.2f} tokens per target forward {speed}, {ratio:.2f} times plain")
print("all outputs:", "identical to plain generate" if same else "not all those of plain generate (ties)")
