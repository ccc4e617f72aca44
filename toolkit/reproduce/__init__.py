"""Train and evaluate what the paper's tables have."""
