"""Text on the host: from messages to token ids and labels, and back."""
