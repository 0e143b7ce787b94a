"""Checkpoints on disk: names, safetensors shards, loading, conversion. Needs numpy alone, never MindSpore."""
