"""An exported EAGLE-3 head in other people's code: the package speculators loads it and gives the same logits.

In this package's environment, then in one that has speculators (its pins are older than ours):

    python benchmarks/speculators_head.py write FOLDER
    python benchmarks/speculators_head.py compare FOLDER
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

STEPS, ROWS = 3, 12
VARIANTS = {
    "plain": {},
    "reduced": dict(draft_vocab_size=40),
    "norm_before_residual": dict(norm_before_residual=True),
    "norm_before_fc": dict(norm_before_fc=True),
    "fc_norm, norm_output": dict(fc_norm=True, norm_output=True),
    "two layers": dict(num_hidden_layers=2),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "Qwen3's layer": dict(qk_norm=True),
}


def write(folder: Path) -> None:
    """Heads with random weights in speculators' form, inputs, and our logits of each step (steps, rows, draft vocabulary)."""
    from hf_onlinespec.heads.config import Eagle3Config
    from hf_onlinespec.heads.eagle3 import Eagle3Head
    from hf_onlinespec.heads.writing import write_head

    torch.manual_seed(1)
    sizes = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, head_dim=8
    )
    target = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, initializer_range=0.2))
    target.save_pretrained(folder / "target")
    target.config.name_or_path = str(folder / "target")
    for name, settings in VARIANTS.items():
        torch.manual_seed(0)
        config = Eagle3Config(
            hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=64,
            reads=(1, 2, 3), initializer_range=0.2, max_position_embeddings=256, **settings,
        )  # fmt: skip
        ids = torch.randperm(64)[: config.draft_vocab_size].sort().values
        head = Eagle3Head(config, ids).eval()
        head.share(target)
        for key, parameter in head.named_parameters():
            if "norm" in key or "bias" in key:
                torch.nn.init.normal_(parameter, 1.0 if "norm" in key else 0.0, 0.3)
        tokens, features = torch.randint(64, (1, ROWS + STEPS)), torch.randn(1, ROWS, 96)
        seen = torch.ones(ROWS, ROWS, dtype=torch.bool).tril()
        own = torch.eye(ROWS, dtype=torch.bool)
        logits, hidden, cache = [], None, None
        with torch.no_grad():
            for step in range(STEPS):
                out = head(
                    tokens[:, step : ROWS + step],
                    features=features if step == 0 else None,
                    hidden=hidden,
                    past_key_values=cache,
                    use_cache=True,
                    attention_mask=torch.cat([seen, *[own] * step], 1)[None, None],
                    position_ids=torch.arange(step, ROWS + step)[None],
                )
                logits.append(out.logits[0])
                hidden, cache = out.hidden, out.cache
        write_head(head, folder / name, "speculators", target_config=target.config)
        save_file(
            {"tokens": tokens, "features": features, "logits": torch.stack(logits)}, folder / f"{name}.safetensors"
        )


def compare(folder: Path) -> None:
    """Prints the largest difference of any logit; raises where it is above 1e-4."""
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

    print("speculators", version("speculators"))
    for name in VARIANTS:
        expected = load_file(folder / f"{name}.safetensors")
        config = Eagle3SpeculatorConfig.from_pretrained(str(folder / name))
        config.transformer_layer_config._attn_implementation = "eager"
        model = Eagle3DraftModel.from_pretrained(str(folder / name), config=config).eval().float()
        found: list[Tensor] = []
        model.lm_head.register_forward_hook(lambda _module, _args, out, into=found: into.append(out[0]))
        with torch.no_grad():
            model(
                hidden_states=expected["features"],
                input_ids=expected["tokens"][:, :ROWS],
                document_ids=torch.zeros(1, ROWS, dtype=torch.long),
                ttt_steps=STEPS,
            )
        # The tokens behind the last rows are padding to speculators, which shifts those that it has.
        worst = max(float((found[k] - expected["logits"][k])[: ROWS - k].abs().max()) for k in range(STEPS))
        print(f"{name:24} {worst:.1e} of logits up to {float(expected['logits'].abs().max()):.1f}")
        assert worst < 1e-4, name


if __name__ == "__main__":
    {"write": write, "compare": compare}[sys.argv[1]](Path(sys.argv[2]))
