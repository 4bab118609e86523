"""lm_eval's `hf` model on a generate task of this folder's own, one question at a time and in batches, with and without the model
attached.

pip install lm_eval; python examples/integrations/lm_eval_task.py [--model FOLDER]
"""

import json
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.models.huggingface import HFLM
from local_model import folder
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_onlinespec
from hf_onlinespec.embedded import FOLDER, load_draft

QUESTIONS = 6


def task(where: Path) -> dict:
    """Held-out shell pages of the embedded pair: the first word of the answer is what counts."""
    pages = [json.loads(line) for line in (FOLDER / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    pages = [page for page in pages if page["domain"] == "shell"][:QUESTIONS]
    file = where / "pages.jsonl"
    file.write_text("".join(json.dumps(page) + "\n" for page in pages), encoding="utf-8")
    return {
        "task": "shell_pages",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{reference}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }


def evaluate(model: HFLM, where: Path) -> tuple[dict, list[str]]:
    """The scores, and the answers."""
    found = lm_eval.simple_evaluate(model=model, tasks=[task(where)], bootstrap_iters=0, log_samples=True)
    samples = found["samples"]["shell_pages"]
    return found["results"], [sample["resps"][0][0] for sample in samples]


def main() -> None:
    name = folder(__doc__)
    target, tokenizer = AutoModelForCausalLM.from_pretrained(name, dtype="float32"), AutoTokenizer.from_pretrained(name)
    for batch_size, calls in ((1, QUESTIONS), (8, 1)):
        model = HFLM(pretrained=target, tokenizer=tokenizer, batch_size=batch_size)
        with tempfile.TemporaryDirectory() as where:
            plain = evaluate(model, Path(where))
            with hf_onlinespec.attached(target, load_draft()) as draft:
                served = evaluate(model, Path(where))
        metrics = draft.metrics
        assert served == plain, (served, plain)
        assert metrics.requests == calls and 0 < metrics.rounds < metrics.new_tokens
        print(
            f"batch_size={batch_size}: {QUESTIONS} answers equal plain generation's; {metrics.acceptance_length:.2f} tokens per "
            "target forward"
        )


if __name__ == "__main__":
    main()
