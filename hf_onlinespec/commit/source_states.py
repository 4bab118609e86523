"""The encoder outputs that a draft reads: those of its target, or what its own encoder makes of the same source."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..adapt.gated_lora import GatedLora
from ..models.encoders import SourceInputs, encoded, encoder_of, nothing_read, readable_source, states_width
from ..models.source import Source
from .draft_trees import MOST_OFF


class SourceStates:
    """What a draft reads of sources.

    Args:
        adapter: of a model that reads a source.

    Attributes:
        names: of the model's inputs.
        learns_encoder: whether layers of its encoder carry an adapter: then it is always the own one that reads.
    """

    def __init__(self, adapter: GatedLora) -> None:
        names, encoder = SourceInputs.of(adapter.tree), encoder_of(adapter.tree)
        assert names is not None
        layers = set() if encoder is None else set(encoder.modules())
        self.names, self.learns_encoder = names, any(layer in layers for layer in adapter.layers)
        self._width, self._nothing = states_width(adapter.tree), nothing_read(adapter.tree)
        self._target: weakref.ref[PreTrainedModel] | None = None
        self._shared: bool | None = None  # whether the own encoder says what the target's says; None: not tried yet

    def belongs_to(self, target: PreTrainedModel) -> None:
        """Notes, weakly, the target whose encoder may be shared."""
        if self._target is None or self._target() is not target:
            self._target, self._shared = weakref.ref(target), None

    def readable(self, model: PreTrainedModel, source: Source) -> Source | None:
        """Of the source of one row, without padding: the target's outputs where they are read, else what is to be encoded.

        None: neither is known, or it is of another kind.

        Args:
            model: the module tree of the base.
        """
        read, states = readable_source(model, source), source.states
        assert states is not None
        outputs = Source(None, None, states.to(model.dtype))
        if self.names.encodes is None:
            return outputs if states.shape[-1] == self._width else None
        if self._shared is None and read is not None and not self.learns_encoder:  # tried once for each target
            own, states = encoded(model, read, None).float(), states.float()
            same = own.shape == states.shape
            self._shared = same and bool((own - states).abs().amax() <= MOST_OFF * states.abs().amax())
        return outputs if self._shared else read

    def states(self, model: PreTrainedModel, sources: Sequence[Source | None]) -> tuple[Tensor, Tensor | None]:
        """Encoder outputs (rows, most, width) for every row, and their mask; for a text without a source a row of zeros.

        Gradients flow through the encoder where it carries an adapter.

        Args:
            model: the module tree that reads, see `DraftModel.serving`.
        """
        own = [self._nothing if source is None else source for source in sources]
        # Copies of a row are read once, unless each has an adapter of its own.
        keys = [i if self.learns_encoder else id(one) for i, one in enumerate(own)]
        left = {key: one for key, one in zip(keys, own, strict=True) if one.states is None}
        found = dict(zip(left, self._encoded(model, list(left.values())), strict=True))
        return _padded(
            [found[key] if one.states is None else one.states[0] for key, one in zip(keys, own, strict=True)]
        )

    def _encoded(self, model: PreTrainedModel, sources: list[Source]) -> list[Tensor]:
        """What the own encoder makes of every source, (n, width) each."""
        if not sources:
            return []
        with torch.set_grad_enabled(self.learns_encoder and torch.is_grad_enabled()):
            if sources[0].tokens is None:
                signals = [one.signal for one in sources if one.signal is not None]
                return list(encoded(model, Source(None, None, None, torch.cat(signals)), None))
            tokens, mask = _padded([one.tokens[0] for one in sources if one.tokens is not None])
            states = encoded(model, Source(tokens, None, None), mask)
        return list(states) if mask is None else [row[own != 0] for row, own in zip(states, mask, strict=True)]


def _padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Rows (n_i, …) as a batch that is padded on the right, and its mask; None: all are equally long."""
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    batch = pad_sequence(list(rows), batch_first=True)
    places = torch.arange(batch.shape[1], device=batch.device)
    return batch, None if int(lengths.min()) == batch.shape[1] else (places < lengths[:, None]).long()
