"""What looks at runs or arranges them. Training works without this folder; README.md has the studies."""
