"""The network: every formula of the model description stands here once, in the file with its name."""
