"""What is minimised: cells that take a batch and give a total, its parts, and what else the step must know."""
