"""A KV-cache and migration runtime: layers move between pipeline stages while tokens flow."""
