"""Pictures and sounds, as processors hand them to the models of `tests/multimodal.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

VIDEO, IMAGE, START, AUDIO = (
    4,
    5,
    6,
    7,
)  # what stands for a part of a video, of a picture; begins one; for a part of a sound


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def text(n: int) -> Tensor:
    """(1, n) tokens, none of them special."""
    return torch.randint(8, 64, (1, n), generator=torch.Generator().manual_seed(n))


def grid(*shape: int) -> dict[str, Tensor]:
    """A picture of 4 × 4 patches."""
    return {"pixel_values": noise(16, *shape), "image_grid_thw": torch.tensor([[1, 4, 4]])}


SIZES = {"image_sizes": torch.tensor([[16, 16]])}
SIDE_BY_SIDE = "patches side by side"  # those of several pictures too
# A picture or a sound, as processors hand it to the models.
SHOWN: dict[str, Callable[[], dict[str, Tensor]]] = {
    "": dict,
    "a picture": lambda: {"pixel_values": noise(1, 3, 16, 16)},
    "a picture and its size": lambda: {"pixel_values": noise(1, 3, 16, 16)} | SIZES,
    "a picture in two parts": lambda: {"pixel_values": noise(1, 2, 3, 16, 16)} | SIZES,
    "one of several pictures": lambda: {"pixel_values": noise(1, 1, 3, 16, 16)},
    "patches of two frames": lambda: grid(3 * 2 * 8 * 8),
    "patches": lambda: grid(3 * 8 * 8),
    "square patches": lambda: grid(3, 8, 8),
    "patches, merged": lambda: grid(3 * 8 * 8) | {"image_merge_sizes": torch.tensor([1])},
    "patches and their mask": lambda: {
        "pixel_values": noise(1, 4, 3 * 8 * 8),
        "spatial_shapes": torch.tensor([[2, 2]]),
        "pixel_attention_mask": torch.ones(1, 4, dtype=torch.long),
    },
    "a picture and a question of it": lambda: {"pixel_values": noise(1, 3, 16, 16), "qformer_input_ids": text(3)},
    "frames and a question of them": lambda: {"pixel_values": noise(1, 4, 3, 16, 16), "qformer_input_ids": text(3)},
    "a picture and its places": lambda: {"pixel_values": noise(1, 3, 16, 16)},
    "a picture that each token sees": lambda: {"pixel_values": noise(1, 1, 3, 16, 16)},
    "patches and how they are pooled": lambda: {
        "pixel_values": noise(1, 4, 3 * 8 * 8),
        "image_token_pooling": torch.tensor([[0, 1], [2, 3]]),
        "image_grids": torch.tensor([[1, 2, 0, 0]]),
        "image_num_crops": torch.tensor([1]),
    },
    "a wave": lambda: {"input_values": noise(1, 1, 1024)},
    "a sound for each token": lambda: {"input_features": noise(1, 8, 512)},
    "a picture, coarse and fine": lambda: {
        "pixel_values": noise(1, 3, 16, 16),
        "high_res_pixel_values": noise(1, 3, 64, 64),
    },
    "patches and their places": lambda: {
        "pixel_values": noise(1, 16, 3 * 8 * 8),
        "image_position_ids": torch.cartesian_prod(*[torch.arange(4)] * 2)[None],
    },
    "tiles of a picture": lambda: {
        "pixel_values": noise(1, 1, 3, 16, 16),
        "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool),
    },
    "cubes of pictures": lambda: {"pixel_values": noise(2, 2, 8, 8, 3)},
    "squares of patches": lambda: {"pixel_values": noise(4, 16, 16, 3), "image_grid_thw": torch.tensor([[1, 2, 2]])},
    "patches in rows": lambda: {"pixel_values": noise(1, 3, 3 * 8 * 8)},
    "patches and their rows": lambda: {"flattened_patches": noise(1, 4, 2 + 3 * 8 * 8).abs()},
    "a picture, whole and cropped": lambda: (
        {"image_pixel_values": noise(1, 2, 3, 16, 16), "image_attention_mask": torch.ones(1, 2, 2, 2, dtype=torch.long)}
        | SIZES
    ),
    "a picture in tiles": lambda: {
        "pixel_values": noise(1, 1, 2, 3, 16, 16),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.ones(1, 1, 2, dtype=torch.long),
    },
    SIDE_BY_SIDE: lambda: {"pixel_values": noise(1, 3, 8, 8 * 16), "target_sizes": torch.tensor([[4, 4]])},
    "patches of a grid": lambda: {"pixel_values": noise(16, 3 * 8 * 8), "image_grid_hw": torch.tensor([[4, 4]])},
    "a sound": lambda: {"input_features": noise(1, 8, 16), "input_features_mask": torch.ones(1, 16, dtype=torch.long)},
    "a spectrogram": lambda: {
        "input_features": noise(1, 16, 8),
        "input_features_mask": torch.ones(1, 16, dtype=torch.long),
    },
    "a sound and its mask": lambda: {
        "input_features": noise(1, 8, 16),
        "feature_attention_mask": torch.ones(1, 16, dtype=torch.long),
    },
    "a sound and how long it is": lambda: {
        "input_features": noise(1, 8, 16),
        "input_features_mask": torch.ones(1, 16, dtype=torch.long),
        "padding_mask": torch.ones(1, 16, dtype=torch.long),
    },
    "stacked frames of sound": lambda: {
        "input_features": noise(1, 8, 56),
        "input_features_mask": torch.ones(1, 8, dtype=torch.long),
    },
    "a short wave": lambda: {"input_values": noise(1, 1, 16)},
    "a spectrogram alone": lambda: {"input_features": noise(1, 16, 8)},
    "1 s of sound": lambda: {
        "input_features": noise(1, 8, 100),
        "input_features_mask": torch.ones(1, 100, dtype=torch.long),
    },
    "30 s of sound": lambda: {"input_features": noise(1, 8, 3000)},
}
