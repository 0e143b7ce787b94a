"""Training: losses, optimizer, data, and the way into MindFormers."""
