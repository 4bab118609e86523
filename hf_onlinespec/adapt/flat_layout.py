"""Where each parameter of an adapter lies in one flat vector, and which parts of it belong to which block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

ADAPTER = "default"  # as PEFT names it


@dataclass(frozen=True)
class Piece:
    """One parameter of the adapter inside the flat vector."""

    name: str  # as PEFT's files call it
    path: str  # as the model calls it
    place: slice
    shape: torch.Size
    columns: bool  # B: blocks are its columns; A: blocks are its rows


class FlatLayout:
    """The pieces of a flat vector (parameters,).

    Args:
        tree: the module tree; its parameters that ask for gradients are the adapter's.
        blocks, rank: how many adapters stand side by side, and the size of one.
    """

    def __init__(self, tree: nn.Module, blocks: int, rank: int) -> None:
        self.blocks, self.rank = blocks, rank
        self.pieces: list[Piece] = []
        start = 0
        for name, parameter in tree.named_parameters():
            if parameter.requires_grad:
                end = start + parameter.numel()
                columns = "lora_B" in name or "lora_embedding_B" in name
                in_file = f"base_model.model.{name}".replace(f".{ADAPTER}", "")
                self.pieces.append(Piece(in_file, name, slice(start, end), parameter.shape, columns))
                start = end
        self.size = start

    def split(self, vector: Tensor) -> Tensor:
        """A flat vector as (blocks, parameters of one block), each row as an adapter of one block would have it."""
        if self.blocks == 1:
            return vector[None]
        rows = []
        for piece in self.pieces:
            part = vector[piece.place]
            if piece.columns:  # (d_out, blocks · rank)
                part = part.view(-1, self.blocks, self.rank).transpose(0, 1)
            rows.append(part.reshape(self.blocks, -1))
        return torch.cat(rows, dim=1)

    def join(self, rows: Tensor) -> Tensor:
        """The inverse of `split`."""
        if self.blocks == 1:
            return rows[0]
        vector, start = rows.new_empty(self.size), 0
        for piece in self.pieces:
            end = start + piece.shape.numel() // self.blocks
            part = rows[:, start:end]
            if piece.columns:
                part = part.reshape(self.blocks, -1, self.rank).transpose(0, 1)
            vector[piece.place] = part.reshape(-1)
            start = end
        return vector

    def with_zero_b(self, block: Tensor) -> Tensor:
        """A copy of one block's parameters that changes nothing, as a new adapter's do: B is zero."""
        block, start = block.clone(), 0
        for piece in self.pieces:
            end = start + piece.shape.numel() // self.blocks
            if piece.columns:
                block[start:end] = 0.0
            start = end
        return block

    def weighted(self, params: Tensor, weights: Tensor | None) -> Tensor:
        """A copy as one ordinary adapter: the weights (blocks,) are in B; None: all are 1."""
        params = params.clone()
        if weights is not None:
            for piece in self.pieces:
                if piece.columns:
                    b = params[piece.place].view(piece.shape)
                    b.mul_(weights.repeat_interleave(self.rank))
        return params

    def named(self, params: Tensor) -> dict[str, Tensor]:
        """The parts of a flat vector by the names that PEFT gives them in files, as views."""
        return {piece.name: params[piece.place].view(piece.shape) for piece in self.pieces}

    def outputs(self, params: Tensor) -> dict[str, Tensor]:
        """The same, of B alone: what `weighted` changes."""
        return {piece.name: params[piece.place].view(piece.shape) for piece in self.pieces if piece.columns}

    def placed(self, parts: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Parts by PEFT's names, by the names that the model gives them, on a device."""
        return {piece.path: parts[piece.name].to(device) for piece in self.pieces}


def flattened(tree: nn.Module, layout: FlatLayout) -> tuple[Tensor, Tensor]:
    """Moves the adapter's parameters, and their gradients, into one float32 vector each: one step is then one operation."""
    named = dict(tree.named_parameters())
    device = named[layout.pieces[0].path].device
    params = torch.empty(layout.size, device=device, dtype=torch.float32)
    grads = torch.zeros_like(params)
    for piece in layout.pieces:
        parameter = named[piece.path]
        params[piece.place].copy_(parameter.detach().flatten())
        parameter.data = params[piece.place].view_as(parameter)
        parameter.grad = grads[piece.place].view_as(parameter)
    return params, grads
