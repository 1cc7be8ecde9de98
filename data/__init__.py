"""Prompts, graders, converters, files, and the small worlds."""
