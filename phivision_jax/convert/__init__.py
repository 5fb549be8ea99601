"""Weights between Hugging Face safetensors and checkpoints of this project, bit for bit."""
