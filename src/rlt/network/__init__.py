"""The packed network: `PackedTokens` -> logits."""
