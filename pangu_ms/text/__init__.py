"""Text in and out: tokenizer, chat template, replies taken apart, stop strings. Needs no MindSpore."""
