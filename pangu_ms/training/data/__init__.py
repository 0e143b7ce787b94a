"""Training data: files of texts and chats to token ids, and those to sequences of one length. Needs no MindSpore."""
LOADERS = ("PanguJsonlLoader", "PanguIndexedLoader")  # what a YAML file names by `type`, see `loader.py`
