"""A run: its checkpoints, what it logs, MindFormers around it, the command."""
