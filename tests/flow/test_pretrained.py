"""A job whose model is a mapping of parts, through Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from context_diffusion.cluster.driver import Options, run_generate
from context_diffusion.core.generate_job import GenerateJob
from support.manifests import write_pictures
from support.tiny_diffusers import make_base, make_controlnet, make_image_encoder, make_ip_adapter

pytestmark = pytest.mark.ray


@pytest.mark.usefixtures("shared_ray")
def test_a_manifest_by_stable_diffusion_with_two_controlnets_and_maps_of_its_own(tmp_path: Path) -> None:
    base = make_base(tmp_path)
    model = {"base": base, "controlnet": [make_controlnet(tmp_path, seed=seed) for seed in (1, 2)]}
    model |= {"image_encoder": make_image_encoder(tmp_path), **make_ip_adapter(tmp_path, base, plus=True)}
    write_pictures(tmp_path, 3)
    rows = [
        {"id": "plain", "query": "picture-0.png", "context": ["picture-1.png"], "prompt": "a cat"},
        {
            "id": "longer",
            "query": "picture-1.png",
            "context": ["picture-0.png", "picture-2.png"],
            "num_inference_steps": 4,
        },
        {
            "id": "cut",
            "query": "picture-2.png",
            "context": "picture-0.png",
            "prompt": "words " * 40,
            "scheduler": "euler_a",
        },
        {
            "id": "maps",
            "query": "picture-0.png",
            "context": "picture-1.png",
            "control_image": ["picture-1.png", "picture-2.png"],
        },
        {
            "id": "one map",
            "query": "picture-0.png",
            "context": "picture-1.png",
            "control_image": "picture-1.png",
        },
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    job = GenerateJob.model_validate(
        {
            "kind": "generate",
            "manifest": str(tmp_path / "m.jsonl"),
            "output": str(tmp_path / "out"),
            "model": model,
            "control": ["canny", "gray"],
            "settings": {
                "num_inference_steps": 2,
                "guidance_scale": 3.0,
                "controlnet_conditioning_scale": [0.8, 0.4],
            },
            "cluster": {"cpu_threads": 1},
        }
    )
    summary = run_generate(job, Options())
    assert (summary["ok"], summary["failed"]) == (4, 1)
    assert 0.5 < summary["occupancy"] <= 1
    parts = sorted((tmp_path / "out" / "data").iterdir())
    made = {row["id"]: row for part in parts for row in pq.read_table(part).to_pylist()}
    assert "1 images" in made["one map"]["error_message"]
    assert [made[name]["prompt_truncated"] for name in ("plain", "cut")] == [False, True]
    assert made["plain"]["control"] == "canny+gray"
    assert made["plain"]["controlnet_conditioning_scale"] == pytest.approx([0.8, 0.4])
    assert made["plain"]["sha256"] != made["maps"]["sha256"]
    assert [Path(path).name for path in made["maps"]["control_image"]] == ["picture-1.png", "picture-2.png"]
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["model"]["name"] == base
    assert run_generate(job, Options())["skipped"] == 5
