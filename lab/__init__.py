"""What looks at runs or arranges them: recipes, reports, tables, the diagnosis, the preflight. Training works without."""
