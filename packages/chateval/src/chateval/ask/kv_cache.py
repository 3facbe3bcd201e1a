"""Keys and values of everything a batch of rows has read so far, so that a new token costs one position.

Shapes: L layers, B rows, S slots, K key/value heads, D head size. A row's token at position p is in slot p, so a row
sees the slots up to its own position. Later slots (the padding of a shorter prompt) are never seen, and are
overwritten when the row gets there.
"""

import torch
from torch import Tensor

from chattrain.model import ModelConfig

# On cuda S is rounded up to this: cuDNN's attention builds a graph for every new S, 23 to 37 ms. Elsewhere S is exact,
# because what attention adds up is then in the same order as ever.
SLOT_MULTIPLE = 64


class KeyValueCache:
    """The `cache` argument of `GPT.forward` (chattrain.model.Cache)."""

    def __init__(
        self, config: ModelConfig, num_rows: int, num_slots: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.n_layer, num_rows, num_slots, config.n_kv_head, config.head_size)
        # zeros, because an unseen slot has weight 0, but 0 times NaN is NaN
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self._positions: Tensor | None = None  # None: the first tokens are prompts [B, T], padded on the right
        self._mask: Tensor | None = None
        self._multiple, self._num_read = SLOT_MULTIPLE if device.type == "cuda" else 1, 0

    @property
    def num_rows(self) -> int:
        return self.keys.size(1)

    def advance(self, positions: Tensor, longest: int) -> None:
        """The next tokens are one per row [B, 1], at `positions` [B]; `longest` is the largest of them."""
        self._num_read = min(-(-(longest + 1) // self._multiple) * self._multiple, self.keys.size(2))
        self._positions, slots = positions, torch.arange(self._num_read, device=positions.device)
        self._mask = (slots <= positions[:, None])[:, None, None, :]

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these."""
        index = torch.tensor(rows, device=self.keys.device)
        self.keys, self.values = self.keys.index_select(1, index), self.values.index_select(1, index)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """A layer's new k, v [B, T, K, D] → all keys, all values [B, S, K, D], mask [B, 1, T, S] (None: causal)."""
        if self._positions is None:
            self.keys[layer, :, : k.size(1)], self.values[layer, :, : v.size(1)] = k, v
            return k, v, None
        rows = torch.arange(len(k), device=k.device)
        self.keys[layer, rows, self._positions], self.values[layer, rows, self._positions] = k[:, 0], v[:, 0]
        return self.keys[layer, :, : self._num_read], self.values[layer, :, : self._num_read], self._mask
