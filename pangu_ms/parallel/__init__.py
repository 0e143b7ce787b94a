"""Several processes that share one model or one batch."""
