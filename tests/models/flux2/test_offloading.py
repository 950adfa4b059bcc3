"""Encoders that leave a GPU after their use."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from context_diffusion.models.flux2.offloading import WORKING_BYTES, Offloaded, needed_bytes, wants_offloading
from context_diffusion.pipeline import ContextDiffusion
from support.tiny import GPU
from support.tiny_flux2 import save_tiny_klein, tiny_images


def test_a_device_needs_room_for_all_weights_and_to_work_in() -> None:
    networks = [nn.Linear(1024, 1024, bias=False), nn.BatchNorm1d(8)]
    assert needed_bytes(networks) == WORKING_BYTES + 4 * 1024**2 + 4 * 4 * 8 + 8
    assert not wants_offloading("auto", networks, torch.device("cpu"))
    assert not wants_offloading("off", networks, torch.device("cuda"))


def test_the_weights_are_the_same_in_use_and_after_it_even_where_the_use_fails() -> None:
    network = nn.Linear(4, 4)
    before = network.weight.clone()
    offloaded = Offloaded(network, torch.device("cpu"))
    with offloaded.in_use():
        assert torch.equal(network.weight, before)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), offloaded.in_use():
        network(torch.zeros(1, 3))
    assert torch.equal(network.weight, before)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU)])
def test_an_offloaded_text_encoder_gives_the_same_image_and_leaves_the_gpu(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(save_tiny_klein(tmp_path))
    query, context = tiny_images(2, [(96, 64)])
    resident = ContextDiffusion.from_pretrained(folder, device, offload="off")
    monkeypatch.setattr("context_diffusion.models.flux2.offloading.WORKING_BYTES", 2**50)
    away = ContextDiffusion.from_pretrained(folder, device)
    images = [model(query, [context], "a misty forest", seed=1) for model in (resident, away)]
    assert np.array_equal(*map(np.asarray, images))
    encoder = away.backbone.text.encoder  # type: ignore[attr-defined]
    assert encoder.embed_tokens.weight.device.type == "cpu"
