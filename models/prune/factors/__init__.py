"""What `svd` needs around its decomposition: ranks, what they are chosen by, the model with factors."""
