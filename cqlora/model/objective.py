"""What is optimised: the adapted model and its loss as one module, so that DDP and FSDP see a single forward."""

from dataclasses import replace

import torch
from torch import nn

from cqlora.model.attention import mask_kwargs
from cqlora.model.batch import Batch
from cqlora.model.load import find_decoder, find_embedding, find_head
from cqlora.model.loss import OutputHead, label_cross_entropy, likeliest_tokens
from cqlora.model.noise import EmbeddingNoise


class Objective(nn.Module):
    """Cross entropy of an adapted causal language model on packs."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, autocast: bool) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.autocast = autocast and dtype is not torch.float32

    def forward(
        self, batch: Batch, divisor: float, noise: EmbeddingNoise | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of one micro batch.

        Args:
            batch: tokens of T positions.
            divisor: label tokens of the whole global batch, so that gradients add up to its mean.
            noise: what is added to the embeddings of the tokens, in training alone.

        Returns:
            The sum of the token losses over `divisor`, and the token losses (L,) in float32, detached.
        """
        return label_cross_entropy(*self._run(batch, noise), divisor)

    def likeliest(self, batch: Batch) -> torch.Tensor:
        """(L,) int64: the token that the model takes for likeliest at each label."""
        hidden, positions, _, head = self._run(batch)
        return likeliest_tokens(hidden, positions, head)

    def _run(
        self, batch: Batch, noise: EmbeddingNoise | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, OutputHead]:
        """Hidden states after the last block, and label positions, targets and the head on the same device."""
        decoder = find_decoder(self.model)
        with torch.autocast(batch.input_ids.device.type, self.dtype, enabled=self.autocast):
            inputs = {"input_ids": batch.input_ids}
            if noise is not None:
                embeddings = find_embedding(self.model)(batch.input_ids)
                inputs = {"inputs_embeds": noise.add_to(embeddings, batch.document_lengths)}
            mask = mask_kwargs(decoder, batch.input_ids.device)
            hidden = decoder(
                **inputs, **mask, position_ids=batch.position_ids, use_cache=False, **batch.attention
            ).last_hidden_state
        # A head that trains whole is held in float32 and computes as the rest does.
        head = replace(OutputHead.from_module(find_head(self.model)), dtype=self.dtype)
        # Under `layers` the head may be on another GPU than the last block, and both on another than the batch.
        device = head.weight.device
        return hidden.to(device), batch.label_positions.to(device), batch.targets.to(device), head
