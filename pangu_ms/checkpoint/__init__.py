"""Reading checkpoints: directories, safetensors shards, layouts, loading, inspecting. Needs no MindSpore."""
