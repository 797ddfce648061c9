"""Post-train a language model from a config."""
