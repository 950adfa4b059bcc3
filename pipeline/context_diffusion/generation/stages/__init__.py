"""The stages of a shard as plain callables: read, load, generate, write. Knows no Ray."""
