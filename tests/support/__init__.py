"""What several tests share: table models, the exact oracle, mutants of the shipped code."""
