"""A trained model over HTTP: an OpenAI-style API and a chat page, both on one engine that batches continuously."""
