"""Fine-tuning: learns one's own pictures, resumes bit for bit, leaves a model; a wrong or full folder is
told."""

from __future__ import annotations

import copy
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from context_diffusion import ContextDiffusion
from context_diffusion.core.errors import ModelError, StorageError
from context_diffusion.models.native.build import build
from context_diffusion.models.native.model import NativeModel
from context_diffusion.training import diffusion
from context_diffusion.training.data.encoded_pools import encode
from context_diffusion.training.data.pools import Pools
from context_diffusion.training.data.user_batches import Mixed
from context_diffusion.training.data.user_images import read_user_images
from context_diffusion.training.finetune import UserData
from context_diffusion.training.loop.checkpoints import load_checkpoint, save_checkpoint
from context_diffusion.training.loop.distributed import Workers
from context_diffusion.training.run import run_training
from support.tiny import SIZES, make_tiny, picture, tiny_model
from support.user_images import job, write_base, write_styles


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures of samples: they cost more than the training."""
    monkeypatch.setattr(diffusion, "save_samples", lambda *_: None)


def losses(output: Path, stage: str) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["stage"] == stage]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    modules = NativeModel.from_pretrained(folder).modules.items()
    return {f"{name}.{key}": value for name, module in modules for key, value in module.state_dict().items()}


def test_it_learns_its_own_pictures_and_leaves_a_model_that_makes_others_than_its_base(
    tmp_path: Path,
) -> None:
    data, base = write_styles(tmp_path / "own", pictures=3), write_base(tmp_path / "base")
    (data / "style-0" / "notes.txt").write_text("no picture")
    faster = {"batch_size": 8, "learning_rate": 2e-3, "matrix_learning_rate": 0.02}
    summary = run_training(
        job(data, tmp_path / "out", base, max_steps=40, checkpoint_every=30, keep=0.0, diffusion=faster)
    )
    before, _, after = losses(tmp_path / "out", "validation")
    assert after < 0.9 * before
    assert summary["validation_loss"] == after
    assert (summary["steps"], summary["styles"], summary["pictures"], summary["skipped"]) == (40, 2, 6, 1)
    assert summary["skipped_names"] == [str(data / "style-0" / "notes.txt")]
    assert (tmp_path / "out" / "samples.png").stat().st_size > 1000
    old, new = weights(tmp_path / "base"), weights(tmp_path / "out" / "model")
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert not [name for name in moved if name.startswith("vae")], "the autoencoder stays"
    assert {name.split(".")[0] for name in moved} == set(diffusion.TRAINED)
    made = [
        np.asarray(
            ContextDiffusion.from_pretrained(folder)(picture(1), [picture(2)], num_inference_steps=3, seed=1)
        )
        for folder in (base, summary["model"])
    ]
    assert np.abs(made[0].astype(int) - made[1]).mean() > 2


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, base = write_styles(tmp_path / "own"), write_base(tmp_path / "base")
    run_training(job(data, tmp_path / "whole", base))

    def stop_at_second(path: Path, state: dict[str, object]) -> None:
        save_checkpoint(path, state)
        if state["step"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(diffusion, "save_checkpoint", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            run_training(job(data, tmp_path / "stopped", base))
    assert run_training(job(data, tmp_path / "stopped", base))["steps"] == 4
    whole, resumed = weights(tmp_path / "whole" / "model"), weights(tmp_path / "stopped" / "model")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow over 100 kB: torch's and safetensors' own writes fail, as they do where no room is
    left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small")
def test_a_full_disk_or_another_model_leaves_the_last_checkpoint_which_goes_on(tmp_path: Path) -> None:
    data, base = write_styles(tmp_path / "own"), write_base(tmp_path / "base")
    out, path = tmp_path / "out", tmp_path / "out" / "diffusion.pt"
    run_training(job(data, out, base, max_steps=2, keep=0.0))
    model = weights(out / "model")
    with (
        full_disk(),
        pytest.raises(
            StorageError, match=r"diffusion.pt: cannot be written.*rerun the same command to resume"
        ),
    ):
        run_training(job(data, out, base, keep=0.0))
    state = load_checkpoint(path)
    assert state is not None
    assert state["step"] == 2
    assert sorted(p.name for p in out.iterdir()) == ["curves.png", "diffusion.pt", "metrics.jsonl", "model"]
    assert all(torch.equal(value, model[name]) for name, value in weights(out / "model").items())

    build(SIZES.model_copy(update={"width": 48}), ["ocean"]).save_pretrained(tmp_path / "wider")
    with pytest.raises(
        ModelError,
        match=r"another architecture: .* is \(.*32.*\) there and \(.*48.*\) here.*and \d+ more.*output",
    ):
        run_training(job(data, out, str(tmp_path / "wider"), keep=0.0))
    build(SIZES, ["ocean", "dots", "forest"]).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=r"was started with different model .*output"):
        run_training(job(data, out, str(tmp_path / "other"), keep=0.0))
    write_styles(data / "style-1" / "more")
    with pytest.raises(ModelError, match="was started with different data"):
        run_training(job(data, out, base, keep=0.0))
    (data / "style-1" / "more").rename(tmp_path / "more")
    assert run_training(job(data, out, base, keep=0.0))["steps"] == 4


@pytest.mark.usefixtures("small")
def test_a_frozen_context_encoder_sees_each_picture_once_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=48, patch_size=16)).save_pretrained(
        tmp_path / "encoder"
    )
    make_tiny(SIZES.model_copy(update={"context_encoder": str(tmp_path / "encoder")})).save_pretrained(
        tmp_path / "base"
    )
    data, out, seen = write_styles(tmp_path / "own"), tmp_path / "out", []
    summarise = NativeModel.summarise_images
    monkeypatch.setattr(
        NativeModel,
        "summarise_images",
        lambda self, images: seen.append(len(images)) or summarise(self, images),
    )
    run_training(job(data, out, str(tmp_path / "base")))
    assert sum(seen) == 8 + 2 * 4 * 4 + 32 * 4, "one's own, two pools, and the validation's pool"
    old, new = weights(tmp_path / "base"), weights(out / "model")
    moved = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert moved == {"unet", "controlnet", "text_encoder", "fusion"}


@pytest.mark.usefixtures("small")
def test_a_manifest_is_trained_on_with_its_queries_and_prompts(tmp_path: Path) -> None:
    names = [str(path) for path in sorted(write_styles(tmp_path / "own").rglob("picture*"))]
    rows = [
        {"target": names[k], "context": names[k + 1 : k + 3], "query": names[7], "prompt": "ocean dots"}
        for k in range(3)
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = write_base(tmp_path / "base")
    wanted = job(
        tmp_path / "own.jsonl", tmp_path / "out", base, held_out=0.4, diffusion={"prompt_dropout": 0.0}
    )
    assert run_training(wanted)["pictures"] == 6
    model, pictures = tiny_model(), read_user_images(wanted, SIZES.image_size)
    own = UserData(wanted, model, pictures, Pools(wanted, SIZES.image_size))
    samples = own.training.samples(np.random.default_rng(1), 4, 0.0, 0.0, np.arange(4))
    assert samples.prompts == ["ocean dots"] * 4
    [request], [target] = own.examples(1)
    assert request.prompt == "ocean dots"
    assert np.array_equal(target, pictures.pixels[pictures.validation[0].target])


def test_a_wrong_job_ends_with_2_and_says_why(tmp_path: Path) -> None:
    data, base = write_styles(tmp_path / "own", pictures=1), write_base(tmp_path / "base")
    values = {"kind": "finetune", "data": str(data), "model": base, "output": str(tmp_path / "out")}
    command = [sys.executable, "-m", "context_diffusion", "run", "/dev/stdin"]
    done = subprocess.run(command, input=json.dumps(values), capture_output=True, text=True, timeout=120)
    told = json.loads(done.stdout)
    assert done.returncode == told["exit"] == 2
    assert "style-0 (1 of 1 files), style-1 (1 of 1 files)" in told["error"]
    config = Path(base) / "image_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "resnet"}))
    with pytest.raises(
        ModelError, match=r"unknown model_type 'resnet'; expected one of `small`, or .*DINOv2"
    ):
        run_training(job(write_styles(tmp_path / "more"), tmp_path / "out", base))
    assert not (tmp_path / "out").exists()


def test_a_worker_without_pictures_and_a_batch_without_contexts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workers, "here", classmethod(lambda cls: cls(1, 2)))
    monkeypatch.setattr(Workers, "gather", lambda _self, share, _rows: share)
    assert encode(tiny_model(), picture(1)[None]).shape == (0, *tiny_model().latent_shape)
    monkeypatch.undo()
    wanted = job(
        write_styles(tmp_path / "own"),
        tmp_path,
        write_base(tmp_path / "base"),
        diffusion={"context_dropout": 1.0},
    )
    model = copy.deepcopy(tiny_model())
    pictures = read_user_images(wanted, SIZES.image_size)
    run = diffusion.Run(wanted, model, tmp_path, {})
    assert torch.isfinite(
        run.train_step(UserData(wanted, model, pictures, Pools(wanted, SIZES.image_size)).training)
    )


@pytest.mark.parametrize("keep", [0.0, 0.4])
def test_a_batch_in_parts_has_the_gradients_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: float
) -> None:
    monkeypatch.setattr(
        torch, "autocast", lambda *_, **__: nullcontext()
    )  # so that rounding is far below what is looked for
    data, base, grads, losses = write_styles(tmp_path / "own"), write_base(tmp_path / "base"), [], []
    for accumulate in (1, 3):
        steps = {"batch_size": 10, "accumulate": accumulate, "auxiliary": 0.2}
        wanted, model = (
            job(data, tmp_path / "out", base, keep=keep, diffusion=steps),
            copy.deepcopy(tiny_model()),
        )
        run = diffusion.Run(wanted, model, tmp_path, {})
        monkeypatch.setattr(run.optimizer, "step", lambda *_: None)
        monkeypatch.setattr(run.clipping, "bound", lambda: None)
        pictures = read_user_images(wanted, SIZES.image_size)
        losses.append(
            run.train_step(UserData(wanted, model, pictures, Pools(wanted, SIZES.image_size)).at(0)).item()
        )
        own = [*run.modules.parameters(), *run.heads.parameters()]
        grads.append(
            torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in own])
        )
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert (grads[1] - grads[0]).norm() < 1e-3 * grads[0].norm()


def test_a_batch_keeps_its_share_of_old_styles_and_workers_share_it_row_by_row(tmp_path: Path) -> None:
    wanted = job(write_styles(tmp_path / "own"), tmp_path, write_base(tmp_path / "base"), controls=["canny"])
    pictures = read_user_images(wanted, SIZES.image_size)
    source = UserData(wanted, tiny_model(), pictures, Pools(wanted, SIZES.image_size)).at(0)
    assert isinstance(source, Mixed)

    def samples(workers: Workers) -> Any:
        return source.samples(np.random.default_rng(3), 10, 0.2, 0.5, workers.share(np.arange(10)))

    whole = samples(Workers())
    assert {source.user.draw_kind(np.random.default_rng(k)) for k in range(20)} == {"canny"}  # type: ignore[attr-defined]
    kept = round(0.25 * 10)
    assert len(whole.hints.palettes) == whole.counts[:kept].sum(), "hints are for the generator's rows alone"
    own = [pixels.tobytes() for pixels in pictures.pixels]
    ends = whole.counts.cumsum()

    def shown(k: int) -> bytes:
        return whole.contexts[k].permute(1, 2, 0).numpy().tobytes()

    assert not [k for k in range(ends[kept - 1]) if shown(k) in own]
    assert all(shown(k) in own for k in range(ends[kept - 1], ends[-1]))
    for rank in range(3):
        mine = samples(Workers(rank, 3))
        rows = np.arange(10)[rank::3]
        assert torch.equal(mine.latents, whole.latents[rows])
        # Own maps are encoded anew, a batch of another size: its last bits may differ.
        torch.testing.assert_close(mine.controls, whole.controls[rows], atol=2e-2, rtol=2e-2)
        assert mine.counts.tolist() == whole.counts[rows].tolist()
        assert mine.prompts == [whole.prompts[r] for r in rows]
        seen = np.concatenate([np.arange(ends[r] - whole.counts[r], ends[r]) for r in rows])
        assert torch.equal(mine.contexts, whole.contexts[seen])
