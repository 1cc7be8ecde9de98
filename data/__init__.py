"""Data: prompts and their check, graders, converters, the small worlds, and the files that a run writes."""
