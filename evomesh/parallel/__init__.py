"""Which ranks work together and how: grid, modes, shard specs, and the only home of collectives."""
