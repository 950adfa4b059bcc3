"""The job files of `kind: train` and `kind: finetune`, with all sizes of data, model and steps."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from context_diffusion.core.job_base import (
    KIND,
    NormalizationKind,
    OutputFolder,
    StorageOptions,
    StrictModel,
    known_columns,
)
from context_diffusion.core.schema import CONTEXT, PROMPT, QUERY, TARGET

SMALL = "small"  # the native context encoder
REPORTS = (
    "steps between reports: validation, samples, curves, model/; checkpoints are also written every 5 minutes"
)


class AutoencoderSteps(StrictModel):
    """The stage that trains the autoencoder."""

    minutes: float = Field(default=25, gt=0, description="duration; the learning rate decays over it")
    decoder_minutes: float = Field(
        default=4, gt=0, description="duration of the final stage: the decoder alone"
    )
    batch_size: int = Field(default=16, ge=1, description="of all workers together")
    learning_rate: float = Field(default=5e-4, gt=0, description="of AdamW")
    crops: float = Field(
        default=0.8, ge=0, le=1, description="first part of the stage, on quarters of images"
    )
    latent_noise: float = Field(
        default=0.08, ge=0, description="noise on the latents, which makes the decoder robust to small errors"
    )


class DiffusionSteps(StrictModel):
    """The stage that trains the diffusion model."""

    minutes: float = Field(default=170, gt=0, description="duration; the learning rate decays over it")
    batch_size: int = Field(default=32, ge=1, description="of all workers together")
    accumulate: int = Field(default=1, ge=1, description="gradient accumulation steps of each worker")
    learning_rate: float = Field(default=1e-3, gt=0, description="of AdamW: vectors and outer layers")
    matrix_learning_rate: float = Field(default=0.02, gt=0, description="of Muon, for the other matrices")
    ema: float = Field(default=0.999, ge=0, lt=1, description="decay of the averaged weights")
    min_snr: float = Field(default=5.0, gt=0, description="gamma of min-SNR weighting (Hang et al. 2023)")
    context_dropout: float = Field(default=0.15, ge=0, le=1, description="share of samples without contexts")
    prompt_dropout: float = Field(default=0.4, ge=0, le=1, description="fraction of samples without a prompt")
    crops: float = Field(
        default=0.0, ge=0, le=1, description="first part of the stage, on quarters of images"
    )
    auxiliary: float = Field(default=0.2, ge=0, description="weight of the loss of the auxiliary heads")


class Normalization(StrictModel):
    """Which images are normalised by their own mean and std, and how the statistics of contexts are used."""

    contexts: NormalizationKind | None = Field(
        default=None,
        description="per image or per channel; none: the encoder's constants; default: channel for small, "
        "else none",
    )
    query: NormalizationKind = Field(
        default="channel", description="of control maps that are images (none, gray)"
    )
    statistics: Literal["dropped", "token", "restored"] = Field(
        default="token",
        description="of contexts: given to the model as an embedding (token), or imposed on the output "
        "(restored)",
    )


class FinetuneSteps(DiffusionSteps):
    """The stage that fine-tunes the diffusion model, with smaller steps so that it keeps what it learned."""

    minutes: float = Field(default=15, gt=0, description="duration; the learning rate decays over it")
    learning_rate: float = Field(default=1e-4, gt=0, description="of AdamW: vectors and outer layers")
    matrix_learning_rate: float = Field(default=0.002, gt=0, description="of Muon, for the other matrices")
    ema: float = Field(default=0.98, ge=0, lt=1, description="decay of the averaged weights")
    auxiliary: float = Field(
        default=0.0,
        ge=0,
        description="weight of the loss of the auxiliary heads, which start untrained; for the rows of "
        "`keep` only",
    )


class ReliefSteps(StrictModel):
    """The stage that learns to separate textures from layouts, for drafts with the contexts' textures."""

    steps: int = Field(
        default=4500, ge=0, description="steps of the stage, at most `max_steps`; 0: the stage is skipped"
    )
    batch_size: int = Field(default=16, ge=1, description="images, each with its own layout and style")
    learning_rate: float = Field(default=1e-3, gt=0, description="of AdamW: vectors and outer layers")
    matrix_learning_rate: float = Field(default=0.01, gt=0, description="of Muon, for the other matrices")


class Architecture(StrictModel):
    """The sizes of the native model's components."""

    image_size: int = Field(default=128, multiple_of=16, description="pixels per side")
    vae_width: int = Field(default=64, description="channels of the autoencoder")
    latent_factor: Literal[4, 8] = Field(default=4, description="pixels per side of a latent")
    fold: Literal[1, 2] | None = Field(
        default=None,
        description="latents per side of one position of the U-Net's grid; default: so many that it covers "
        "8 pixels",
    )
    latent_channels: int = Field(default=8, description="channels of the latents")
    channels: list[Annotated[int, Field(ge=16, multiple_of=16)]] = Field(
        default=[96, 192], min_length=1, description="channels of the U-Net and the ControlNet per level"
    )
    attention: list[bool] = Field(
        default=[False, True], description="levels of the U-Net that have cross-attention"
    )
    layers_per_block: int = Field(default=1, ge=1, description="residual blocks per level")
    attention_heads: int = Field(
        default=4,
        ge=1,
        description="attention heads of the U-Net, the text encoder and the small context encoder",
    )
    width: int = Field(default=128, description="width of text and context tokens")
    encoder_layers: int = Field(
        default=2, ge=1, description="layers of the text encoder and the small context encoder"
    )
    context_encoder: str = Field(
        default=SMALL,
        min_length=1,
        description="small, or the folder or hub id of a CLIP, SigLIP or DINOv2 model, which is not trained",
    )
    context_patch: int = Field(default=8, description="pixels of the small context encoder's patches")
    context_grid: int = Field(default=4, description="each context has grid x grid tokens")
    context_slots: int = Field(default=8, description="maximum number of contexts of a row")
    draft: bool = Field(
        default=True,
        description="the U-Net gets a draft: the query's tones in the contexts' colours "
        "(models/native/draft.py)",
    )
    noise_scale: float = Field(default=0.55, gt=0, le=1, description="scale of the initial noise in sampling")
    rest_scale: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="scale of what the U-Net adds to a draft in sampling; 0: the draft alone",
    )
    detail_scale: float = Field(
        default=1.0, ge=0, le=1, description="scale of the draft's detail that is restored after decoding"
    )
    text_length: int = Field(default=20, description="maximum number of tokens of a prompt")
    normalization: Normalization = Normalization()

    @property
    def place(self) -> int:
        """Pixels per side of one position of the U-Net's grid."""
        return self.latent_factor * (self.fold or 8 // self.latent_factor)

    @property
    def folded_channels(self) -> int:
        """Channels of the U-Net's input: all latents of one position."""
        return self.latent_channels * (self.place // self.latent_factor) ** 2

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        levels = len(self.channels)
        if len(self.attention) != levels:
            raise ValueError(
                f"attention has {len(self.attention)} levels, channels has {levels}: they must be equal"
            )
        if self.image_size % (factor := self.place * 2 ** (levels - 1)):
            raise ValueError(
                f"image_size ({self.image_size}) must be a multiple of {factor} for {levels} levels of "
                "channels"
            )
        return self


class TrainingJob(StrictModel):
    """The keys that both kinds of training share."""

    kind: str
    output: OutputFolder = Field(description="folder for checkpoints, metrics, samples and the model")
    seed: int = Field(default=0, ge=0, description="seed of initial weights, data and noise")
    styles: int = Field(default=640, ge=2, description="styles per pool of data")
    pictures: int = Field(default=5, ge=4, description="layouts per style of a pool")
    pool_steps: int = Field(default=800, ge=1, description="steps before the next pool is generated")
    checkpoint_every: int = Field(default=500, ge=1, description=REPORTS)
    workers: int = Field(
        default=1, ge=1, description="worker processes on Ray Train; each takes its share of a batch"
    )
    cpu_threads: int = Field(default=2, ge=1, description="CPU threads of each worker")
    data_processes: int = Field(
        default=1,
        ge=0,
        description="processes of each worker that prepare its data; about 14 keep a fast GPU busy",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: GPUs if each worker can have one"
    )
    max_steps: int | None = Field(
        default=None, ge=1, description="maximum steps of each stage; default: limited by the minutes alone"
    )
    diffusion: DiffusionSteps = DiffusionSteps()

    @property
    def smallest_batch(self) -> int:
        """The smallest batch size of all stages."""
        return self.diffusion.batch_size

    @property
    def processes(self) -> int:
        """The processes that prepare data: none for a run of a few steps."""
        return 0 if self.max_steps else self.data_processes

    @model_validator(mode="after")
    def _every_worker_has_a_row(self) -> Self:
        smallest = self.smallest_batch
        if self.workers > smallest:
            raise ValueError(
                f"workers ({self.workers}) must not exceed the smallest batch_size ({smallest}): each takes "
                "a share of it"
            )
        if (parts := self.workers * self.diffusion.accumulate) > self.diffusion.batch_size:
            raise ValueError(
                f"workers x accumulate ({parts}) must not exceed diffusion.batch_size "
                f"({self.diffusion.batch_size})"
            )
        return self


class TrainJob(TrainingJob):
    """kind: train. Trains a model from scratch on generated data and writes its folder."""

    kind: Literal["train"] = Field(description=KIND)
    architecture: Architecture = Architecture()
    memory_steps: int = Field(
        default=1500,
        ge=0,
        description="steps of the stage that learns the looks of words; 0: the stage is skipped",
    )
    relief: ReliefSteps = ReliefSteps()
    autoencoder: AutoencoderSteps = AutoencoderSteps()

    @property
    def smallest_batch(self) -> int:
        return min(self.relief.batch_size, self.autoencoder.batch_size, self.diffusion.batch_size)


class FinetuneJob(TrainingJob):
    """kind: finetune. Trains a native model on a user's images and writes its folder."""

    kind: Literal["finetune"] = Field(description=KIND)
    data: str = Field(
        min_length=1, description="a folder with a sub-folder of images per style, or a manifest"
    )
    model: str = Field(
        default="bundled",
        min_length=1,
        description="the initial model: bundled, or the folder of a native model",
    )
    keep: float = Field(
        default=0.25,
        ge=0,
        lt=1,
        description="fraction of each batch that is generated data, which preserves the styles "
        "learned before",
    )
    held_out: float = Field(
        default=0.1,
        ge=0,
        le=0.5,
        description="fraction of each style's images that is used for validation only",
    )
    controls: list[Literal["gray", "none", "canny", "soft_edges"]] = Field(
        default=["gray", "none", "canny", "soft_edges"],
        min_length=1,
        description="the kinds of control maps that are computed from queries",
    )
    columns: Annotated[dict[str, str], known_columns(TARGET, CONTEXT, QUERY, PROMPT)] = Field(
        default={}, description="mapping of column names: ours -> the manifest's"
    )
    allow: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[], description="URI prefixes that rows may read; default: the manifest's folder"
    )
    storage_options: StorageOptions = Field(
        default={}, description="fsspec options per protocol, without secrets: {s3: {endpoint_url: ...}}"
    )
    seed: int = Field(
        default=0, ge=0, description="seed of batches, noise and the choice of validation images"
    )
    styles: int = Field(default=160, ge=2, description="styles per pool of generated data")
    checkpoint_every: int = Field(default=200, ge=1, description=REPORTS)
    diffusion: FinetuneSteps = FinetuneSteps()
