"""What a draft head is made of, whatever form it was read from."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from ..errors import DraftError


class HeadConfig(PretrainedConfig):
    """The layer of a head, which is a Llama layer, and the target that it reads.

    Attributes:
        hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, head_dim, hidden_act, rms_norm_eps, attention_bias,
            mlp_bias, rope_parameters, initializer_range: as in transformers' LlamaConfig.
        num_hidden_layers: decoder layers with a KV cache.
        qkv_bias: a bias of queries, keys and values; None: as `attention_bias` says.
        qk_norm: RMSNorm on the queries and keys of each attention head, as in a Qwen3 layer.
        max_position_embeddings: the target's; a head's own file often says 2048 whatever the target takes.
        vocab_size: tokens of the target.
        target_hidden_size: width of the target's hidden states; None: `hidden_size`.
        target_layers: decoder layers of the target; None: not known.
        own_embeddings: whether the head has a token embedding of its own; else it reads with the target's, see `Head.share`.
    """

    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 1
    num_attention_heads: int = 9
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-5
    attention_bias: bool = False
    qkv_bias: bool | None = None
    qk_norm: bool = False
    mlp_bias: bool = False
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] | None = None
    initializer_range: float = 0.02
    vocab_size: int = 32000
    target_hidden_size: int | None = None
    target_layers: int | None = None
    own_embeddings: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.qkv_bias is None:
            self.qkv_bias = self.attention_bias
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.target_hidden_size is None:
            self.target_hidden_size = self.hidden_size
        super().__post_init__(**kwargs)
        if not self.own_embeddings and self.hidden_size != self.target_hidden_size:
            raise DraftError(
                f"The head is {self.hidden_size} wide (hidden_size) and its target {self.target_hidden_size} "
                "(target_hidden_size), so it cannot read with the target's embedding: it needs its own, embed_tokens.weight."
            )


class Eagle3Config(HeadConfig):
    """EAGLE-3: one row of several hidden states of the target, then a decoder layer over the embedding and the projected row.

    Attributes:
        reads: indices of the target's `hidden_states` tuple, in the order of concatenation.
        draft_vocab_size: tokens that the head can propose; None: all of `vocab_size`.
        norm_before_residual: the first layer's residual is the normalised hidden input.
        norm_before_fc: one RMSNorm over the concatenated features.
        fc_norm: an RMSNorm for each feature (EAGLE 3.1); not together with `norm_before_fc`.
        norm_output: a later step is fed the hidden state after the last norm (EAGLE 3.1).
        bias: of `fc`.
    """

    model_type = "hf_onlinespec_eagle3"

    reads: list[int] | tuple[int, ...] = (2, 15, 27)
    draft_vocab_size: int | None = None
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.draft_vocab_size is None:
            self.draft_vocab_size = self.vocab_size
        super().__post_init__(**kwargs)
        if self.norm_before_fc and self.fc_norm:
            raise DraftError("norm_before_fc and fc_norm are both set: the features are normalised once.")
        if not 0 < self.draft_vocab_size <= self.vocab_size:
            raise DraftError(
                f"draft_vocab_size={self.draft_vocab_size}: expected 1 to vocab_size={self.vocab_size} tokens."
            )


class Eagle1Config(HeadConfig):
    """EAGLE-1 and EAGLE-2, which have one head: the target's last hidden state, and the target's vocabulary head.

    Attributes:
        bias: of `fc`.
    """

    model_type = "hf_onlinespec_eagle1"

    bias: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.hidden_size != self.target_hidden_size:
            raise DraftError(
                f"hidden_size={self.hidden_size} and target_hidden_size={self.target_hidden_size}: an EAGLE-1 head predicts the "
                "target's hidden states, and is as wide as they are."
            )


class MtpConfig(HeadConfig):
    """An MTP layer of the target's own checkpoint: what it is made of is the target's to say."""

    model_type = "hf_onlinespec_mtp"


class GemmaAssistantConfig(HeadConfig):
    """A Gemma-4 assistant of transformers, which is a folder of its own.

    Attributes:
        num_hidden_layers: types of layers whose keys and values are held, and one layer more of what marks them.
        shared: by the type of the target's layers, heads and width of the keys, and of the values, of each token.
        window: tokens that layers of the type "sliding_attention" see, their own not counted.
        ordered: whether the logits are those of some clusters of tokens alone, by their centroids.
    """

    model_type = "hf_onlinespec_gemma_assistant"

    shared: dict[str, Any] | None = None
    window: int = 512
    ordered: bool = False


class DFlashConfig(HeadConfig):
    """A DFlash draft of transformers, which is a folder of its own.

    Attributes:
        reads: indices of the target's `hidden_states` tuple, in the order of concatenation.
        block_size: places of a block; the token that is known stands in the first one.
        mask_token_id: stands in all others.
        window: how far a layer of the type "sliding_attention" sees.
    """

    model_type = "hf_onlinespec_dflash"

    reads: list[int] | tuple[int, ...] = ()
    block_size: int = 16
    mask_token_id: int = 0
    window: int = 2048


class HydraConfig(HeadConfig):
    """Hydra: one small network for each drafted token, over the target's last hidden state and the tokens since.

    Attributes:
        num_heads: how many of them there are: tokens that can be drafted.
        num_blocks: blocks in each of them; all behind the first one share their weights.
        prefix: whether a decoder layer with a KV cache reads the hidden states first ("prefix-mlp", Hydra++).
    """

    model_type = "hf_onlinespec_hydra"

    num_heads: int = 4
    num_blocks: int = 1
    prefix: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.hidden_size != self.target_hidden_size:
            raise DraftError(
                f"hidden_size={self.hidden_size} and target_hidden_size={self.target_hidden_size}: a Hydra head is as wide as its "
                "target's hidden states."
            )
