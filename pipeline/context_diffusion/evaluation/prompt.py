"""The prompt score: whether an image shows what its prompt names, by the bundled or another CLIP model."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from context_diffusion.core.errors import ModelError
from context_diffusion.core.records import Pixels

transformers.utils.logging.disable_progress_bar()

BUNDLED = Path(__file__).parent / "judge"  # trained by evaluation/train_judge.py
COLOURS = [
    "autumn", "ocean", "forest", "sunset", "pink", "icy", "sandy", "neon", "candy", "grey", "red", "olive",
    "violet", "turquoise",
]  # fmt: skip
SURFACES = [
    "plain",
    "striped",
    "dotted",
    "checked",
    "grainy",
    "hatched",
    "wavy",
    "shaded",
    "brushed",
    "mosaic",
]
REFERENCES = [f"{colour} colours with {surface} texture" for colour in COLOURS for surface in SURFACES]


class PromptJudge:
    """A CLIPModel with its tokenizer and image processor."""

    def __init__(self, name: str = "bundled") -> None:
        """Load a model from safetensors, without running its code. name: `bundled`, a folder or a hub id.

        Raises ModelError.
        """
        source = str(BUNDLED) if name == "bundled" else name
        try:
            self.model = CLIPModel.from_pretrained(source, use_safetensors=True, dtype=torch.float32).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            self.processor = CLIPImageProcessorPil.from_pretrained(source)
        except Exception as error:  # transformers raises many kinds for invalid files
            message = f"judge: {name!r} is not a CLIP model with a tokenizer and an image processor: {error}"
            raise ModelError(message) from error
        self.references = self.embed_prompts(REFERENCES)

    @torch.inference_mode()
    def embed_prompts(self, prompts: list[str]) -> Tensor:
        """Return embeddings (N, D) of length 1."""
        words = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
        features = self.model.get_text_features(words["input_ids"], words["attention_mask"]).pooler_output
        return torch.nn.functional.normalize(features, dim=1)

    @torch.inference_mode()
    def embed_images(self, images: list[Pixels]) -> Tensor:
        """Return embeddings (N, D) of length 1."""
        pixels = self.processor([Image.fromarray(image) for image in images], return_tensors="pt")[
            "pixel_values"
        ]
        return torch.nn.functional.normalize(self.model.get_image_features(pixels).pooler_output, dim=1)

    def score(self, image: Pixels, prompt: str) -> float:
        """Return the prompt_score."""
        embedding = self.embed_images([image])[0]
        prompt_similarity = self.embed_prompts([prompt])[0] @ embedding
        reference_similarities = self.references @ embedding
        scale = self.model.logit_scale.detach().exp()
        return float((scale * (prompt_similarity - reference_similarities)).sigmoid().mean())


@cache
def load_judge(name: str = "bundled") -> PromptJudge:
    """Return a judge, loaded once per process."""
    return PromptJudge(name)


def prompt_score(image: Pixels, prompt: str, judge: str = "bundled") -> float:
    """Return the probability that the image belongs to its prompt rather than to another one, 0 to 1.

    0.5: undecided. For each of REFERENCES, 14 kinds of colours in 10 kinds of texture, the model's softmax
    between the two prompts: a logistic function of the difference of their similarities, scaled by the
    model's temperature (Radford et al. 2021). The score is the mean of these, so it hardly depends on the
    level of a model's similarities. The bundled judge knows the words of training/data/prompts.py only and
    ignores others. It distinguishes colours (held-out AUC .999) but not textures (.46).
    """
    return load_judge(judge).score(image, prompt)
