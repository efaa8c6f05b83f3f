"""ZenML stacks for kitaru-zenml."""
