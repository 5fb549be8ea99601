"""The project's own small vocabulary and chat template, for models that start from no checkpoint."""
