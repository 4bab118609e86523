"""An MTP layer as a draft head (DeepSeek-V3, arXiv:2412.19437, section 2.2): it came with the target, trained beside it.

    out = layer(eh_proj([norm(embedding of the token), norm(h)]));  logits = the target's vocabulary head(out)

h is the target's last hidden state in a first step and the last output in a later one. Of several MTP layers the first one drafts, again
and again: each is trained for one depth alone, and an adapter learns what the first one misses deeper.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .._compat.models import max_positions
from .._compat.mtp import mtp_obstacle, read_mtp
from ..errors import DraftError
from ..models.identity import MTP
from ..models.vocabulary import Vocabulary
from .base import Head, HeadOutput, kept, require_one, started
from .config import MtpConfig
from .layer import positions_of


class MtpHead(Head):
    """The first MTP layer of a target. It reads with the target's embedding and says its logits with its vocabulary head.

    Args:
        layer: of transformers.
        rotary: the target's rotary embedding, or a copy.
    """

    config: MtpConfig
    config_class = MtpConfig

    def __init__(self, config: MtpConfig, layer: nn.Module, rotary: nn.Module) -> None:
        super().__init__(config)
        self.layer, self.rotary_emb = layer, rotary

    @property
    def reads(self) -> tuple[int, ...]:
        return (-1,)

    @property
    def most(self) -> int | None:
        return None

    def forward(
        self,
        tokens: Tensor,
        features: Tensor | None = None,
        hidden: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int | Tensor = 0,
    ) -> HeadOutput:
        require_one(features, hidden)
        cache = started(past_key_values, use_cache)
        given = features if features is not None else hidden
        assert given is not None
        given = given.to(self.dtype)
        if position_ids is None:
            past = 0 if cache is None else int(cache.get_seq_length())
            position_ids = positions_of(attention_mask, given.shape[1], past, given.device)
        context = self.context(given, attention_mask, position_ids, cache)
        embedded = self.embedded(tokens).to(given)
        out: Tensor = self.layer(embedded, given, context.rope, context.mask, position_ids, cache)
        return HeadOutput(self.said(kept(out, logits_to_keep)), out, cache)


def mtp_head(target: PreTrainedModel) -> MtpHead:
    """The MTP layer that the target's checkpoint holds, read anew, in the target's precision and on its device.

    Raises:
        DraftError: there is none, or it is none that a head can be made of.
    """
    why = mtp_obstacle(target)
    if why:
        raise DraftError(
            f"The MTP layers of the target {type(target).__name__} cannot draft: {why}. Leave use_mtp out: draft with a small model, or "
            "without one (onlinespec=True)."
        )
    try:
        parts = read_mtp(target)
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise DraftError(
            f"The MTP layers of the target {type(target).__name__} are not in the checkpoint that it was loaded from "
            f"({target.config.name_or_path!r}): {type(error).__name__}: {str(error).partition(chr(10))[0]} Leave use_mtp out."
        ) from error
    config = target.config.get_text_config(decoder=True)
    own = MtpConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        vocab_size=Vocabulary.of(target).size,
        max_position_embeddings=max_positions(target.config),
        target_layers=config.num_hidden_layers,
    )
    own.name_or_path = MTP
    head = MtpHead(own, parts.layer, parts.rotary).eval()
    head.share(target)
    return head
