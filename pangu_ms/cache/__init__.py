"""The decoding state: rings and growing tensors, what a step does to them and how the host keeps them."""
