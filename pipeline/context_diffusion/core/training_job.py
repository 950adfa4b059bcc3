"""The job files of `kind: train` and `kind: finetune`. Every number that makes the data, the model or the steps stands
here."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from context_diffusion.core.job_base import KIND, NormalizationKind, OutputFolder, StorageOptions, StrictModel, known_columns
from context_diffusion.core.schema import CONTEXT, PROMPT, QUERY, TARGET

SMALL = "small"  # the context encoder of our own
REPORTS = "steps between reports: validation, samples, curves, model/; a checkpoint comes every 5 minutes too"


class AutoencoderSteps(StrictModel):
    minutes: float = Field(default=25, gt=0, description="of every worker's threads; the learning rate falls to the end")
    decoder_minutes: float = Field(default=4, gt=0, description="of the decoder alone, last of all")
    batch_size: int = Field(default=16, ge=1, description="of all workers together")
    learning_rate: float = Field(default=5e-4, gt=0, description="of AdamW; 2e-3 lost 2 dB and most hues")
    crops: float = Field(default=0.8, ge=0, le=1, description="share, from the start, that learns from quarters of the pictures")
    latent_noise: float = Field(default=0.08, ge=0, description="noise on the latents, so that small errors don't show")


class DiffusionSteps(StrictModel):
    minutes: float = Field(default=170, gt=0, description="of every worker's threads; the learning rate falls to the end")
    batch_size: int = Field(default=32, ge=1, description="of all workers together")
    accumulate: int = Field(default=1, ge=1, description="parts of a worker's share, one by one: less memory, same steps")
    learning_rate: float = Field(default=1e-3, gt=0, description="of AdamW: vectors, embeddings, first and last layers")
    matrix_learning_rate: float = Field(default=0.02, gt=0, description="of Muon: the matrices within")
    ema: float = Field(default=0.999, ge=0, lt=1, description="the averaged weights' memory")
    min_snr: float = Field(default=5.0, gt=0, description="Hang et al. 2023, gamma")
    context_dropout: float = Field(default=0.15, ge=0, le=1, description="share of samples without contexts")
    prompt_dropout: float = Field(default=0.4, ge=0, le=1, description="share of samples without a prompt")
    crops: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of the stage, from its start, that learns from quarters of the pictures",
    )
    auxiliary: float = Field(default=0.2, ge=0, description="weight of the loss of the auxiliary heads")


class Normalization(StrictModel):
    """Which pictures lose their own mean and deviation, and what becomes of the contexts'."""

    contexts: NormalizationKind | None = Field(
        default=None,
        description="of the whole picture or by channel; none: the encoder's constants; left out: channel for small, else none",
    )
    query: NormalizationKind = Field(default="channel", description="of control maps that are pictures (none, gray)")
    statistics: Literal["dropped", "token", "restored"] = Field(
        default="token", description="the contexts': given as an embedding, or the output's are moved to them at the end"
    )


class FinetuneSteps(DiffusionSteps):
    """The same steps, smaller: a trained model is to learn without forgetting."""

    minutes: float = Field(default=15, gt=0, description="of every worker's threads; the learning rate falls to the end")
    learning_rate: float = Field(default=1e-4, gt=0, description="of AdamW: vectors, embeddings, first and last layers")
    matrix_learning_rate: float = Field(default=0.002, gt=0, description="of Muon: the matrices within")
    ema: float = Field(default=0.98, ge=0, lt=1, description="the averaged weights' memory")
    auxiliary: float = Field(default=0.0, ge=0, description="of the auxiliary heads, which begin anew; on `keep`'s rows only")


class ReliefSteps(StrictModel):
    """The stage in which textures are learned to be told from layouts; drafts wear the contexts'."""

    steps: int = Field(default=4500, ge=0, description="of the stage, at most `max_steps`; 0: not at all")
    batch_size: int = Field(default=16, ge=1, description="pictures, each of a layout and a style of its own")
    learning_rate: float = Field(default=1e-3, gt=0, description="of AdamW: vectors, first and last layers")
    matrix_learning_rate: float = Field(default=0.01, gt=0, description="of Muon: the matrices within")


class Architecture(StrictModel):
    """Sizes of the native model's components."""

    image_size: int = Field(default=128, multiple_of=16, description="pixels a side")
    vae_width: int = Field(default=64, description="channels of the autoencoder")
    latent_factor: Literal[4, 8] = Field(default=4, description="pixels a side of a latent")
    fold: Literal[1, 2] | None = Field(
        default=None, description="latents a side that are one place of the U-Net's grid; left out: 8 pixels are"
    )
    latent_channels: int = Field(default=8, description="channels of the latents")
    channels: list[Annotated[int, Field(ge=16, multiple_of=16)]] = Field(
        default=[96, 192], min_length=1, description="of the U-Net and the ControlNet, by level"
    )
    attention: list[bool] = Field(default=[False, True], description="which levels of the U-Net have cross-attention")
    layers_per_block: int = Field(default=1, ge=1, description="residual blocks of a level")
    attention_heads: int = Field(default=4, ge=1, description="of the U-Net, the text and the small context encoder")
    width: int = Field(default=128, description="of text and context tokens")
    encoder_layers: int = Field(default=2, ge=1, description="of the text and the small context encoder")
    context_encoder: str = Field(
        default=SMALL, min_length=1, description="small; or CLIP, SigLIP, DINOv2 by folder or hub id, not trained"
    )
    context_patch: int = Field(default=8, description="pixels of the small context encoder's patches")
    context_grid: int = Field(default=4, description="a context becomes grid x grid tokens")
    context_slots: int = Field(default=8, description="contexts that a row may have")
    draft: bool = Field(default=True, description="the U-Net is shown the query's tones in the contexts' colours: model/draft.py")
    noise_scale: float = Field(default=0.55, gt=0, le=1, description="of sampling: a small model is unsure of much")
    rest_scale: float = Field(default=1.0, ge=0, le=1, description="of what the U-Net adds to a draft, in sampling; 0: the draft")
    detail_scale: float = Field(default=1.0, ge=0, le=1, description="of a draft's detail that its copy by the autoencoder lacks")
    text_length: int = Field(default=20, description="tokens of a prompt")
    normalization: Normalization = Normalization()

    @property
    def place(self) -> int:
        """Pixels a side of a place of the U-Net's grid."""
        return self.latent_factor * (self.fold or 8 // self.latent_factor)

    @property
    def folded_channels(self) -> int:
        """Of the U-Net's input: all latents of a place."""
        return self.latent_channels * (self.place // self.latent_factor) ** 2

    @model_validator(mode="after")
    def _levels_agree(self) -> Self:
        levels = len(self.channels)
        if len(self.attention) != levels:
            raise ValueError(f"attention has {len(self.attention)} levels, channels {levels}: give each level its own")
        if self.image_size % (factor := self.place * 2 ** (levels - 1)):
            raise ValueError(f"image_size ({self.image_size}) must be a multiple of {factor} for {levels} levels of channels")
        return self


class TrainingJob(StrictModel):
    """What both kinds of training have."""

    kind: str
    output: OutputFolder = Field(description="folder for checkpoints, metrics, samples and the model")
    seed: int = Field(default=0, ge=0, description="of fresh weights, data and noise")
    styles: int = Field(default=640, ge=2, description="styles of one pool of data")
    pictures: int = Field(default=5, ge=4, description="layouts that each style of a pool dresses")
    pool_steps: int = Field(default=800, ge=1, description="steps before the next pool is made")
    checkpoint_every: int = Field(
        default=500,
        ge=1,
        description=REPORTS,
    )
    workers: int = Field(default=1, ge=1, description="processes, on Ray Train; each takes its share of a batch")
    cpu_threads: int = Field(default=2, ge=1, description="of each worker")
    data_processes: int = Field(
        default=1, ge=0, description="of each worker, that make its data ahead; some 14 keep a fast GPU busy"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: GPUs, where each worker can have one")
    max_steps: int | None = Field(default=None, ge=1, description="of each stage; left out: the minutes decide")
    diffusion: DiffusionSteps = DiffusionSteps()

    @property
    def smallest_batch(self) -> int:
        return self.diffusion.batch_size

    @property
    def processes(self) -> int:
        """That make data ahead: none for a run of a few steps."""
        return 0 if self.max_steps else self.data_processes

    @model_validator(mode="after")
    def _every_worker_has_a_row(self) -> Self:
        smallest = self.smallest_batch
        if self.workers > smallest:
            raise ValueError(f"workers ({self.workers}) must not exceed a batch_size ({smallest}): each takes a share of it")
        if (parts := self.workers * self.diffusion.accumulate) > self.diffusion.batch_size:
            raise ValueError(f"workers x accumulate ({parts}) must not exceed diffusion.batch_size ({self.diffusion.batch_size})")
        return self


class TrainJob(TrainingJob):
    """kind: train. The project's own data in, a model folder out."""

    kind: Literal["train"] = Field(description=KIND)
    architecture: Architecture = Architecture()
    memory_steps: int = Field(default=1500, ge=0, description="in which words are learned to be read as looks; 0: not at all")
    relief: ReliefSteps = ReliefSteps()
    autoencoder: AutoencoderSteps = AutoencoderSteps()

    @property
    def smallest_batch(self) -> int:
        return min(self.relief.batch_size, self.autoencoder.batch_size, self.diffusion.batch_size)


class FinetuneJob(TrainingJob):
    """kind: finetune. A model folder and one's own pictures in, a model folder out."""

    kind: Literal["finetune"] = Field(description=KIND)
    data: str = Field(min_length=1, description="a folder with a sub-folder of pictures for each style, or a manifest: see above")
    model: str = Field(default="bundled", min_length=1, description="what to begin with: bundled, or a folder of a native model")
    keep: float = Field(default=0.25, ge=0, lt=1, description="share of a batch that is the project's own data: old styles stay")
    held_out: float = Field(default=0.1, ge=0, le=0.5, description="share of a style's pictures for validation, never trained on")
    controls: list[Literal["gray", "none", "canny", "soft_edges"]] = Field(
        default=["gray", "none", "canny", "soft_edges"], min_length=1, description="the control maps that queries become"
    )
    columns: Annotated[dict[str, str], known_columns(TARGET, CONTEXT, QUERY, PROMPT)] = Field(
        default={}, description="our column name -> the manifest's"
    )
    allow: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[], description="URI prefixes that a manifest may read; left out: its own folder or bucket"
    )
    storage_options: StorageOptions = Field(
        default={}, description="fsspec options by protocol, no secrets: {s3: {endpoint_url: ...}}"
    )
    seed: int = Field(default=0, ge=0, description="of batches and noise, and of which pictures are held out")
    styles: int = Field(default=160, ge=2, description="styles of one pool of the project's own data")
    checkpoint_every: int = Field(
        default=200,
        ge=1,
        description=REPORTS,
    )
    diffusion: FinetuneSteps = FinetuneSteps()
