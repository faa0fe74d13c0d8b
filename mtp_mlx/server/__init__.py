"""The HTTP server: OpenAI's and llama.cpp's wire over the engine."""
