"""Expert pruning for Mixture-of-Experts models: observe, plan, prune, verify, compare."""
