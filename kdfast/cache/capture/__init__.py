"""Capturing a teacher's labels: from a loader, a language model, several processes, a Ray cluster, a vLLM server."""
