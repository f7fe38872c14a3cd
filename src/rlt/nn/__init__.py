"""Parts of packed networks: they work on [tokens, width] and know no batch axis."""
