"""The prompt score: does a picture show what its prompt names? By a CLIP model, the bundled tiny one or any other."""

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

BUNDLED = Path(__file__).parent / "judge"  # evaluation/train_judge.py makes it
COLOURS = [
    "autumn", "ocean", "forest", "sunset", "pink", "icy", "sandy", "neon", "candy", "grey", "red", "olive", "violet",
    "turquoise",
]  # fmt: skip
SURFACES = ["plain", "striped", "dotted", "checked", "grainy", "hatched", "wavy", "shaded", "brushed", "mosaic"]
REFERENCES = [f"{colour} colours with {surface} texture" for colour in COLOURS for surface in SURFACES]


class PromptJudge:
    """A CLIPModel with its tokenizer and image processor."""

    def __init__(self, name: str = "bundled") -> None:
        """name: `bundled`, a folder or a hub id; safetensors alone, none of its code is run. Raises ModelError."""
        source = str(BUNDLED) if name == "bundled" else name
        try:
            self.model = CLIPModel.from_pretrained(source, use_safetensors=True, dtype=torch.float32).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            self.processor = CLIPImageProcessorPil.from_pretrained(source)
        except Exception as error:  # whatever a folder's files lead transformers to
            raise ModelError(f"judge: {name!r} is no CLIP model with tokenizer and image processor: {error}") from error
        self.references = self.embed_prompts(REFERENCES)

    @torch.inference_mode()
    def embed_prompts(self, prompts: list[str]) -> Tensor:
        """-> (N, D), each of length 1."""
        words = self.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
        features = self.model.get_text_features(words["input_ids"], words["attention_mask"]).pooler_output
        return torch.nn.functional.normalize(features, dim=1)

    @torch.inference_mode()
    def embed_images(self, images: list[Pixels]) -> Tensor:
        """-> (N, D), each of length 1."""
        pixels = self.processor([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
        return torch.nn.functional.normalize(self.model.get_image_features(pixels).pooler_output, dim=1)

    def score(self, image: Pixels, prompt: str) -> float:
        """See prompt_score."""
        shown = self.embed_images([image])[0]
        of_prompt, of_others = self.embed_prompts([prompt])[0] @ shown, self.references @ shown
        return float((self.model.logit_scale.detach().exp() * (of_prompt - of_others)).sigmoid().mean())


@cache
def load_judge(name: str = "bundled") -> PromptJudge:
    """Once a process."""
    return PromptJudge(name)


def prompt_score(image: Pixels, prompt: str, judge: str = "bundled") -> float:
    """The chance that the picture belongs to its prompt rather than to another one, 0 to 1; .5: as well as to any.

    For each of REFERENCES, 14 kinds of colours in 10 kinds of texture, the model's own softmax between the two prompts,
    a logistic function of the difference of their similarities by the model's own temperature (Radford et al. 2021);
    the mean of these. So it hardly depends on how high a model's similarities are. The bundled judge knows the words
    of training/data/prompts.py alone, others are as if not there. It tells colours (held-out AUC .999), not yet textures (.46).
    """
    return load_judge(judge).score(image, prompt)
