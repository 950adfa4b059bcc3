"""What the terms of a report mean, in plain words: its tooltips."""

from __future__ import annotations

from context_diffusion.core.errors import REMEDIES, ErrorCode

SCORES = {
    "layout_score": "How far the image's edges agree with its query's. 1: fully, 0: not at all.",
    "style_score": "How far the image's colours and textures agree with its contexts'. 1: fully, 0: not at "
    "all. It is lower where a prompt asks for other colours.",
    "style_similarity": "How alike an image encoder finds the image and its contexts, 0 to 1.",
    "prompt_score": "The probability, by a CLIP model, that the image belongs to its prompt rather than to "
    "another one. 0.5: undecided.",
    "layout_leakage": "The share of the layout that came from a context. 0 is best.",
    "colour_leakage": "The share of the colours that came from the query instead of the contexts. 0 is best.",
}
ERRORS: dict[ErrorCode, str] = {
    ErrorCode.MISSING_FILE: "A file that the row names does not exist.",
    ErrorCode.UNREADABLE_FILE: "A file exists, but may not be read.",
    ErrorCode.FORBIDDEN_URI: "The row names a place that the job does not allow rows to read.",
    ErrorCode.FILE_TOO_LARGE: "A file has more bytes than the job allows.",
    ErrorCode.NOT_AN_IMAGE: "A file is in no image format that can be read.",
    ErrorCode.TRUNCATED_IMAGE: "An image file ends early or is damaged.",
    ErrorCode.TOO_MANY_PIXELS: "An image has more pixels than the job allows.",
    ErrorCode.INVALID_REFERENCE: "An image has sides or an aspect ratio that the model does not read.",
    ErrorCode.INVALID_MASK: "A context's mask has another aspect ratio than the output.",
    ErrorCode.NO_QUERY: "The row has no query image.",
    ErrorCode.NO_CONTEXT: "The row has no context image.",
    ErrorCode.TOO_MANY_CONTEXTS: "The row has more context images than allowed.",
    ErrorCode.UNKNOWN_SCHEDULER: "The row names a scheduler that does not exist.",
    ErrorCode.INVALID_SETTING: "A setting of the row is out of its range or of the wrong type.",
    ErrorCode.INVALID_ID: "The row's id cannot be a file name.",
    ErrorCode.PROMPT_TOO_LONG: "The prompt has more characters than allowed.",
    ErrorCode.ENGINE_CRASH: "The row ended the engine's process three times.",
    ErrorCode.ENGINE_ERROR: "The model failed on this row, or its result was not a number.",
    ErrorCode.OUT_OF_MEMORY: "The row needs more memory than there is, even on its own.",
}
OTHERS = {
    "occupancy": "The share of the model's batches that rows filled in the last run. The rest was computed "
    "for nothing.",
    "start to last image": "From the first start of the job to its last image, with pauses between runs.",
    "prompt leads": "The row is guided by its prompt at least as much as by its contexts, so the prompt may "
    "replace their colours and textures. Look at the prompt score; the style score may be low.",
    "words without effect": "Words of the prompt that the model does not know. The image does not depend on "
    "them. The model card lists the words that it knows.",
}


def glossary() -> dict[str, str]:
    """Return the explanation of each score, error code and other term."""
    codes = {str(code): f"{meaning} To fix it: {REMEDIES[code]}." for code, meaning in ERRORS.items()}
    return SCORES | codes | OTHERS
