"""Scores images against their query, contexts and prompt. Its evaluate job scores finished images."""
