"""Writing checkpoints: from the Hugging Face layout to ours and back. Needs no MindSpore."""
