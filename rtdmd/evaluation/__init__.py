"""Scores of models over sets of prompts: painting, scoring, statistics, tables."""
