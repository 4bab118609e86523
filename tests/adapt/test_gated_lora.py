"""The gate: shut it is the base draft, open it is LoRA, between it is the exact mixture; the user's model never moves."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import PreTrainedModel

from hf_onlinespec import DraftError, OnlineDraft
from hf_onlinespec._compat.adapters import LoraLayer
from hf_onlinespec.adapt.gated_lora import GatedLora, adaptable_layers
from tests.conftest import tiny_gpt2, tiny_llama

TOKENS = torch.tensor([[1, 5, 9, 2, 30, 7], [4, 4, 8, 11, 3, 0]])


def shaken(model: PreTrainedModel, **kwargs: object) -> GatedLora:
    """An adapter that has moved away from its start."""
    lora = GatedLora(model, **({"rank": 4, "alpha": 4.0} | kwargs))
    with torch.no_grad():
        lora.move(0.2 * torch.randn(lora.params.shape, generator=torch.Generator().manual_seed(5)))
    return lora


MODELS = {
    "untied": lambda: tiny_llama(2),
    "tied": lambda: tiny_llama(2, tie_word_embeddings=True),
    "gpt2": lambda: tiny_gpt2(2),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_shut_gate_is_the_original_bit_for_bit(make) -> None:
    model = make()
    before = model(TOKENS).logits
    state = {name: value.clone() for name, value in model.state_dict().items()}
    lora = shaken(model)
    with lora.gated() as speaking:
        assert not torch.allclose(speaking(TOKENS).logits, before, atol=1e-2)
    assert torch.equal(lora.tree(TOKENS).logits, before)  # gate shut again
    assert torch.equal(model(TOKENS).logits, before)  # the user's own model
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_weights_are_shared_not_copied() -> None:
    model = tiny_llama(2)
    lora = GatedLora(model, rank=4, alpha=4.0)
    theirs = {parameter.data_ptr() for parameter in model.parameters()}
    ours = {p.data_ptr() for name, p in lora.tree.named_parameters() if "lora" not in name}
    assert ours == theirs


def test_gate_shuts_after_an_exception() -> None:
    model = tiny_llama(2)
    lora = shaken(model)
    with torch.no_grad(), pytest.raises(RuntimeError, match="halt"), lora.gated():
        raise RuntimeError("halt")
    with torch.no_grad():
        assert torch.equal(lora.tree(TOKENS).logits, model(TOKENS).logits)


# PEFT itself warns here, on loading onto the user's model.
@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|is_gradient_checkpointing|fan_in_fan_out).*")
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_same_logits_as_plain_peft(make, tmp_path) -> None:
    lora = shaken(make(), rank=3, alpha=6.0)
    lora.model.save_pretrained(tmp_path, save_embedding_layers=False)
    reloaded = PeftModel.from_pretrained(make(), tmp_path).eval()
    with lora.gated() as speaking:
        torch.testing.assert_close(speaking(TOKENS).logits, reloaded(TOKENS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_folded_weights_serve_the_same_draft(make) -> None:
    """Folded as beside the weights, after every move; the base stays what it was."""
    model = make()
    before = model(TOKENS).logits
    lora = shaken(model, rank=3, alpha=6.0)
    for _ in range(2):
        lora.fold()
        served = lora.folded_tree(TOKENS).logits
        with lora.gated() as speaking:
            torch.testing.assert_close(served, speaking(TOKENS).logits, atol=1e-4, rtol=1e-4)
        lora.move(0.1 * torch.randn_like(lora.params))
    assert torch.equal(model(TOKENS).logits, before) and torch.equal(lora.tree(TOKENS).logits, before)


@torch.no_grad()
def test_a_mixture_of_blocks_is_the_mixture_of_updates() -> None:
    """B(g ⊙ Ax) with one weight per block equals the weighted sum of each block's own B_i A_i, on every layer."""
    model = tiny_llama(2, tie_word_embeddings=True)
    lora = shaken(model, rank=2, alpha=2.0, blocks=3)
    weights = torch.tensor([[0.5, 0.2, 0.3], [0.0, 1.0, 0.0]])
    with lora.gated(weights) as speaking:
        rows = speaking(TOKENS).logits
    for row, mixture in enumerate(weights):
        folded = tiny_llama(2, tie_word_embeddings=False)
        state = folded.state_dict()
        for name, module in lora.tree.named_modules():
            if name.endswith("embed_tokens"):
                a, b = module.lora_embedding_A["default"], module.lora_embedding_B["default"]
                key, delta = f"{name}.weight", [(b[:, i : i + 2] @ a[i : i + 2]).T for i in (0, 2, 4)]
            elif isinstance(module, LoraLayer):
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
                key, delta = f"{name}.weight", [b[:, i : i + 2] @ a[i : i + 2] for i in (0, 2, 4)]
            else:
                continue
            original = module.get_base_layer().weight
            state[key] = original + sum(w * d for w, d in zip(mixture, delta, strict=True))
        folded.load_state_dict(state)
        torch.testing.assert_close(folded(TOKENS[row : row + 1]).logits[0], rows[row], atol=1e-4, rtol=1e-4)


def test_every_default_layer_learns() -> None:
    """Attention, MLP, embedding and head all carry a parameter that a backward pass reaches."""
    model = tiny_llama(2, tie_word_embeddings=True)
    lora = shaken(model)
    names = adaptable_layers(model)
    assert "model.embed_tokens" in names and "lm_head" in names and len(names) == 2 + 7
    with lora.gated() as speaking:
        speaking(TOKENS).logits.pow(2).sum().backward()
    parameters = [p for p in lora.tree.parameters() if p.requires_grad]
    assert len(parameters) == 2 * len(names)
    assert all(p.grad.abs().sum() > 0 for p in parameters)
    assert lora.grads.norm() > 0  # the flat vector holds them


def test_seeded_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = GatedLora(tiny_llama_without_reseeding(), rank=4, alpha=4.0, seed=1)
    assert torch.equal(torch.rand(2), expected)
    again = GatedLora(tiny_llama(2), rank=4, alpha=4.0, seed=1)
    other = GatedLora(tiny_llama(2), rank=4, alpha=4.0, seed=2)
    assert torch.equal(first.params, again.params) and not torch.equal(first.params, other.params)


def tiny_llama_without_reseeding() -> PreTrainedModel:
    state = torch.get_rng_state()
    model = tiny_llama(2)
    torch.set_rng_state(state)
    return model


def test_bf16_base_keeps_a_float32_adapter() -> None:
    lora = GatedLora(tiny_llama(2).to(torch.bfloat16), rank=4, alpha=4.0)
    assert lora.params.dtype == torch.float32
    with torch.no_grad(), lora.gated() as speaking:
        assert speaking(TOKENS).logits.dtype == torch.bfloat16


def test_nothing_to_adapt_is_refused() -> None:
    with pytest.raises(DraftError, match="no_such_layer"):
        GatedLora(tiny_llama(2), rank=4, alpha=4.0, target_modules=("no_such_layer",))


@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|is_gradient_checkpointing).*")
@torch.no_grad()
def test_peft_draft_is_merged_into_a_copy() -> None:
    """Also where the user's adapter sits on a tied embedding and head."""
    base = tiny_llama(2, tie_word_embeddings=True)
    theirs = get_peft_model(
        base,
        LoraConfig(
            r=2,
            target_modules=["q_proj", "embed_tokens", "lm_head"],
            task_type="CAUSAL_LM",
            ensure_weight_tying=False,
            init_lora_weights=False,
        ),
    )
    theirs.eval()
    before = theirs(TOKENS).logits
    draft = OnlineDraft(theirs)
    torch.testing.assert_close(draft(TOKENS).logits, before, atol=1e-4, rtol=1e-4)
    assert torch.equal(theirs(TOKENS).logits, before)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_folded_weights_hold_the_mixture(make) -> None:
    lora = shaken(make(), rank=2, alpha=2.0, blocks=3)
    for weights in ([0.5, 0.2, 0.1], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]):
        gate = torch.tensor(weights)
        lora.serve(gate)
        lora.fold()
        with lora.gated(gate[None]) as speaking:
            torch.testing.assert_close(lora.folded_tree(TOKENS).logits, speaking(TOKENS).logits, atol=1e-4, rtol=1e-4)
        lora.serve(gate.clone())
        assert not lora.stale, "the same weights ask for no new fold"


# PEFT itself warns here, on loading onto the user's model.
@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|is_gradient_checkpointing|fan_in_fan_out).*")
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_a_mixture_is_saved_as_one_ordinary_adapter(make, tmp_path) -> None:
    lora = shaken(make(), rank=2, alpha=6.0, blocks=3)
    weights = torch.tensor([0.5, 0.2, 0.1])
    lora.serve(weights)
    before = lora.params.clone()
    lora.adapter_config("").save_pretrained(str(tmp_path))
    save_file(lora.named(lora.served_params()), tmp_path / "adapter_model.safetensors")
    assert torch.equal(lora.params, before)
    reloaded = PeftModel.from_pretrained(make(), tmp_path).eval()
    with lora.gated(weights[None]) as speaking:
        torch.testing.assert_close(reloaded(TOKENS).logits, speaking(TOKENS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("blocks", [1, 3])
@torch.no_grad()
def test_a_block_is_laid_out_as_an_adapter_of_one_block(blocks: int) -> None:
    lora = shaken(tiny_llama(2, tie_word_embeddings=True), rank=2, alpha=2.0, blocks=blocks)
    rows = lora.split(lora.params)
    assert rows.shape == (blocks, lora.params.numel() // blocks)
    assert torch.equal(lora.join(rows), lora.params)
    alone = GatedLora(tiny_llama(2, tie_word_embeddings=True), rank=2, alpha=2.0)
    for i, row in enumerate(rows):
        alone.params.copy_(row)
        with alone.gated() as one, lora.gated(torch.eye(blocks)[i : i + 1]) as many:
            torch.testing.assert_close(one(TOKENS).logits, many(TOKENS).logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_silent_block_changes_nothing_and_can_learn() -> None:
    model = tiny_llama(2)
    lora = shaken(model)
    quiet = lora.with_zero_b(lora.split(lora.params)[0])
    lora.params.copy_(lora.join(quiet[None]))
    with lora.gated() as speaking:
        assert torch.equal(speaking(TOKENS).logits, model(TOKENS).logits)
    with torch.enable_grad(), lora.gated() as speaking:
        speaking(TOKENS).logits.square().sum().backward()
    assert lora.grads.norm() > 0
