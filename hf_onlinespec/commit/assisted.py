"""OnlineCandidateGenerator: a draft inside transformers' own assisted decoding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import CandidateGenerator

from ..adapt.feedback import FeedbackRecorder
from ..errors import UnsupportedError
from ..metrics import Counts
from ..models.vocabulary import Vocabulary
from ..rounds import Rows
from .base import Call, Draft
from .request import Request


class OnlineCandidateGenerator(CandidateGenerator):
    """Drafts for one request of transformers' assisted decoding, and hands its feedback to the draft.

    Their loop tells no times and has no end of request: the lookahead is a number, the memory is not asked, and the draft learns
    every `update_every` rounds whatever `update_when` says. Whoever made the generator may call `finish()` for the rest and for
    the replay.

    Args:
        draft: who drafts and learns.
        generation_config: of the call (sampling or greedy, end of sequence, longest length, `num_assistant_tokens`).
        logits_processor: the target's list. A `FeedbackRecorder` is put in front of it; its stateless members are
            applied to the draft too, so that q is warped as p is.
        attention_mask: (batch, prompt) with zeros where the prompt is padded on the left; None: no padding.
        learn: False: this request is only drafted, nothing is recorded, remembered or learned.
        vocabulary: of the target; None: the draft's own. Ids that the draft does not have too are never drafted by it, and it
            reads another token in the place of one that it has no embedding for.

    Raises:
        UnsupportedError: the draft reads hidden states of its target.
    """

    def __init__(
        self,
        draft: Draft,
        generation_config: GenerationConfig,
        logits_processor: LogitsProcessorList,
        attention_mask: Tensor | None = None,
        learn: bool = True,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        if draft.reads:
            raise UnsupportedError(
                "A draft head reads the hidden states of its target, which transformers' own assisted decoding hands to none of our "
                "drafts. Pass the draft to generate as assistant_model=."
            )
        call = Call(
            generation_config,
            logits_processor,
            mask=attention_mask,
            learns=learn,
            vocabulary=vocabulary,
            timed=False,
        )
        self._request = Request(draft, call)
        self._every = draft.settings.update_every
        self._length = 0  # of the request so far
        self._lookahead = draft.governor.constants.planner.first_lookahead
        self.recorder: FeedbackRecorder | None = None  # of the target's raw logits; None: nothing is learned here
        schedule = self._request.schedule
        if schedule is not None and schedule.learns:
            self.recorder = FeedbackRecorder(schedule.attempt, lambda: schedule.learns)
            logits_processor.insert(0, self.recorder)

    @property
    def counts(self) -> Counts:
        """Of this request."""
        return self._request.counts

    def get_candidates(  # type: ignore[override]  # annotated for LongTensor, and as if there were always a q
        self, input_ids: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """`(input_ids with the drafted tokens, log q)`, for transformers' assisted decoding."""
        asked, self._length = self._request.call.lookahead, input_ids.shape[1]
        room = self._request.call.config.max_length - self._length - 1
        with torch.inference_mode(False), torch.no_grad():
            rows = Rows.of(input_ids.clone())
            proposal = self._request.propose(rows, max(0, min(self._lookahead if asked is None else asked, room)))
        candidates = torch.cat([input_ids, proposal.tokens], dim=-1)
        return candidates, None if proposal.q is None else proposal.q.log()

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Learns from a round of transformers' loop; the raw logits come from the recorder, not from `scores`."""
        schedule = self._request.schedule
        if schedule is None:
            return
        with torch.inference_mode(False), torch.no_grad(), schedule.attempt():
            rows = Rows.of(input_ids.clone())
            new = input_ids.shape[1] - self._length
            if self.recorder is not None and not schedule.learns:
                self.recorder.close()
            raw = self.recorder.take(new) if self.recorder is not None and schedule.learns else None
            schedule.record(rows, raw)
            if schedule.rounds % (self._every if isinstance(self._every, int) else 1) == 0:
                schedule.update()

    def finish(self) -> None:
        """Ends the request: learns from what is left of it and replays others, as far as that is worth it."""
        with torch.inference_mode(False), torch.no_grad():
            self._request.finish()
        if self.recorder is not None:
            self.recorder.close()
