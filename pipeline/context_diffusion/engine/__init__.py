"""Encode, denoise, decode: torch only, no Ray, no files."""
