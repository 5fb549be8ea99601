"""A server with OpenAI's chat API, metrics and one page for people, over a local generator."""
