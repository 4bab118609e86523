"""A draft head for a target that has none: the target writes answers, and an EAGLE-3 head learns to foretell them."""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .._compat.models import model_name
from .._compat.tokenizers import chat_inputs
from ..errors import ConfigError, UnsupportedError, require_whole
from ..heads.eagle3 import Eagle3Head
from ..heads.starting import draft_tokens, new_config, special_tokens, start_from_target
from ..heads.writing import write_head
from ..models.identity import public_name
from ..runtime.progress import each
from ..runtime.seeding import seeded
from ..share.provenance import versions
from .head_acceptance import CHAIN, acceptance_by_kind
from .head_answers import Answer, EncodedPrompt, Writing, write_answers
from .head_features import BLOCK, FeatureCache, TargetReader
from .head_loop import HeadLoop, LoopSettings, Progress
from .head_record import TrainingRecord
from .head_start import frequent_tokens
from .warm_start import evaluating

RECORD = "training.json"


@dataclass(frozen=True)
class HeadTraining:
    """Settings of a new head.

    Attributes:
        draft_vocab_size: tokens that the head can propose: the target's most frequent ones.
        reads: indices of the target's hidden states that it reads; None: EAGLE-3's three.
        intermediate_size: of its MLP; None: the target's.
        fc_norm: each of the hidden states is normalised before they are projected (EAGLE 3.1).
        from_target: whether its weights start as the target's, where shapes fit (SmolLM2-135M, one pass over 33,000 answer tokens:
            loss 3.8 against 4.9 from random weights, acceptance length 1.23 against 1.20).
        held_out: part of the greedy answers of each kind that it is measured on, and never trained on.
        cache_bytes: most bytes of hidden states that are kept on disk while it is trained.
    """

    draft_vocab_size: int = 8192
    reads: tuple[int, ...] | None = None
    intermediate_size: int | None = None
    fc_norm: bool = False
    from_target: bool = True
    held_out: float = 0.05
    cache_bytes: int = 8 * 2**30
    writing: Writing = field(default_factory=Writing)
    loop: LoopSettings = field(default_factory=LoopSettings)

    def __post_init__(self) -> None:
        require_whole("draft_vocab_size", self.draft_vocab_size)
        require_whole("cache_bytes", self.cache_bytes, 0)
        if self.intermediate_size is not None:
            require_whole("intermediate_size", self.intermediate_size)
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out={self.held_out}: expected a part of the answers, above 0 and below 1.")


def new_head(
    target: PreTrainedModel,
    prompts: Sequence[EncodedPrompt],
    folder: str | Path,
    config: HeadTraining | None = None,
    *,
    answers: Sequence[Answer] | None = None,
    work: str | Path | None = None,
) -> Eagle3Head:
    """Builds an EAGLE-3 head for a causal language model that hands out hidden states, and writes it to a folder.

    The target writes answers to the prompts, and the head learns the target's law behind each of their tokens by distillation. The
    same call goes on after an interruption: with the answers that were written, and from the last checkpoint to equal bits.

    Args:
        prompts: as the target reads them: see `chat_prompts`.
        folder: of the head (the form of EAGLE-3), its card README.md and its training record training.json.
        answers: are learned instead of the target's answers to `prompts`. They should be the target's own.
        work: folder of answers, cached hidden states and the checkpoint, which may be removed afterwards; None: `folder` + ".work".

    Raises:
        UnsupportedError: the target is an encoder–decoder.
        ConfigError: there are too few answers; `work` belongs to another training.
        DraftError: the target hands out no hidden states.

    Example:
        >>> head = new_head(target, chat_prompts(tokenizer, texts), "my-head")               # doctest: +SKIP
    """
    if target.config.is_encoder_decoder:
        raise UnsupportedError(
            f"The target {type(target).__name__} is an encoder–decoder, and new_head writes answers to prompts of a decoder. Let a head "
            "grow from what it serves: generate(..., onlinespec=OnlineSpecConfig(grow_head=True))."
        )
    config = HeadTraining() if config is None else config
    folder = Path(folder)
    work = folder.with_name(folder.name + ".work") if work is None else Path(work)
    work.mkdir(parents=True, exist_ok=True)
    with evaluating(target):
        if answers is None:
            answers = write_answers(target, prompts, work / "answers.jsonl", config.writing)
        learned, held_out = _split([a for a in answers if a.learned > 0], config)
        head, named = _started(target, learned, config)
        reader = TargetReader(target, head.reads, draft_tokens(head))
        cache = FeatureCache(reader, learned, work / "features", config.cache_bytes)
        measured = FeatureCache(reader, held_out, work / "held_out", config.cache_bytes)
        for one in (measured, cache):
            for block in each(range(one.blocks), "The target reads its answers", f"{BLOCK} answers"):
                one.prepare(block)
        fingerprint = _fingerprint(target, learned, config)
        loop = HeadLoop(
            head, cache, config.loop, work / "checkpoint.pt", fingerprint, partial(acceptance_by_kind, cache=measured)
        )
        done = loop.run()
    record = _record(target, head, learned, held_out, config, done, named)
    head = head.to(target.dtype)  # type: ignore[arg-type]
    write_head(head, folder, "eagle3", target_config=target.config)
    (folder / RECORD).write_text(json.dumps(record.to_dict(), indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(record.card(folder.name), encoding="utf-8")
    shutil.rmtree(work / "features")
    return head


def chat_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], kinds: Sequence[str] | None = None
) -> list[EncodedPrompt]:
    """Texts as prompts: by the tokenizer's chat template, if it has one.

    Args:
        kinds: of the texts, one each.
    """
    kinds = [""] * len(texts) if kinds is None else kinds
    found = []
    for text, kind in zip(texts, kinds, strict=True):
        if tokenizer.chat_template is None:
            tokens = list(tokenizer(text).input_ids)
        else:
            tokens = chat_inputs(tokenizer, [{"role": "user", "content": text}])["input_ids"][0].tolist()
        found.append(EncodedPrompt(tokens, kind))
    return found


def _split(answers: Sequence[Answer], config: HeadTraining) -> tuple[list[Answer], list[Answer]]:
    """The answers to be learned, and those held out: some greedy ones of each kind. No prompt is in both."""
    kinds: dict[str, list[int]] = {}
    for i, answer in enumerate(answers):
        if not answer.sampled:
            kinds.setdefault(answer.kind, []).append(i)
    chosen = random.Random(config.loop.seed)
    taken: set[int] = set()
    for kind in sorted(kinds):
        taken.update(chosen.sample(kinds[kind], math.ceil(config.held_out * len(kinds[kind]))))
    prompts = {tuple(answers[i].prompt) for i in taken}
    learned = [a for a in answers if tuple(a.prompt) not in prompts]
    if not learned or not taken:
        raise ConfigError(
            f"{len(answers)} answers of two tokens or more, {len(taken)} of them held out: too few. Give more prompts, greedy ones among them."
        )
    return learned, [answers[i] for i in sorted(taken)]


def _started(target: PreTrainedModel, answers: Sequence[Answer], config: HeadTraining) -> tuple[Eagle3Head, list[str]]:
    """The head before it has learned anything, in float32 beside its target; and the weights that it has from there."""
    changes: dict[str, Any] = {"fc_norm": config.fc_norm}
    changes |= {} if config.reads is None else {"reads": config.reads}
    changes |= {} if config.intermediate_size is None else {"intermediate_size": config.intermediate_size}
    shape = new_config(target, config.draft_vocab_size, **changes)
    size = shape.draft_vocab_size or shape.vocab_size
    ids = frequent_tokens(answers, size, special_tokens(target), shape.vocab_size)
    with seeded(target, config.loop.seed):
        head = Eagle3Head(shape, ids)
    named = start_from_target(head, target) if config.from_target else []
    head.share(target)
    return head, named


def _fingerprint(target: PreTrainedModel, answers: Sequence[Answer], config: HeadTraining) -> str:
    """Of what a checkpoint belongs to: settings, answers and the target's name."""
    said = [asdict(config), [(a.prompt, a.tokens) for a in answers], model_name(target.config)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _record(
    target: PreTrainedModel,
    head: Eagle3Head,
    answers: Sequence[Answer],
    held_out: Sequence[Answer],
    config: HeadTraining,
    done: Progress,
    named: list[str],
) -> TrainingRecord:
    shape, last = head.config, done.curve[-1]
    return TrainingRecord(
        target=public_name(model_name(target.config)) or None,
        target_class=type(target).__name__,
        parameters=sum(p.numel() for p in head.parameters()),
        reads=list(head.reads),
        vocab_size=shape.vocab_size,
        draft_vocab_size=shape.draft_vocab_size or shape.vocab_size,
        known_share=_known_share(head, held_out),
        answers=len(answers),
        answers_by_kind=dict(sorted(Counter(a.kind for a in answers).items())),
        sampled_answers=sum(a.sampled for a in answers),
        prompt_tokens=sum(len(a.prompt) for a in answers),
        answer_tokens=sum(a.learned for a in answers),
        learned_tokens=done.tokens,
        steps=done.step,
        training_s=done.time_s,
        from_target=named,
        held_out_answers=dict(sorted(Counter(a.kind for a in held_out).items())),
        chain=CHAIN,
        acceptance_length=last.acceptance_length,
        curve=[asdict(point) for point in done.curve],
        settings=asdict(config),
        versions=versions(),
    )


def _known_share(head: Eagle3Head, answers: Sequence[Answer]) -> float:
    """Part of the tokens of answers that the head can propose."""
    if head.draft_ids is None:
        return 1.0
    known = set(head.draft_ids.tolist())
    tokens = [token for answer in answers for token in answer.tokens]
    return sum(token in known for token in tokens) / len(tokens)
