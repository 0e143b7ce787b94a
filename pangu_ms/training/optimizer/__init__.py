"""Muon for the matrices, AdamW for everything else."""
