"""The lanes that a chunk, one call of the model, may have. They decide the bits of images, so they are a
table."""

from __future__ import annotations

from context_diffusion.core.errors import ConfigError

# By model and kind of device: the largest for jobs, smaller ones for single images and where memory is short.
CHUNKS = {
    ("native", "cpu"): (4, 3, 2, 1),
    ("native", "cuda"): (32, 16, 8, 4, 3, 2, 1),
    ("sd", "cpu"): (4, 3, 2, 1),
    ("sd", "cuda"): (16, 8, 4, 3, 2, 1),
    ("sdxl", "cpu"): (4, 3, 2, 1),
    ("sdxl", "cuda"): (8, 6, 4, 3, 2, 1),
}


def check_chunk(chunk: int | None, native: bool, on_cpu: bool) -> None:
    """Check a job's chunk before the model is loaded, as far as model and device are known then.

    native: the model is, else it is a Stable Diffusion. on_cpu: the job's engines do without GPUs; else they
    may be of either kind. Raises ConfigError for a chunk that none of the tables has."""
    tables = {
        key: sizes
        for key, sizes in CHUNKS.items()
        if (key[0] == "native") == native and not (on_cpu and key[1] != "cpu")
    }
    if chunk is None or any(chunk in sizes for sizes in tables.values()):
        return
    known = "; ".join(
        f"{model} on {device}: {', '.join(map(str, sizes))}" for (model, device), sizes in tables.items()
    )
    raise ConfigError(f"cluster.chunk: {chunk} is no size of a chunk; there are, in lanes, {known}")
