"""Scores of a picture against its query, its contexts and its prompt, and the job that gives them to finished ones."""
